"""``python -m benchmarks.cuda``: how the CUDA kernels keep a row on each GPU, the bytes they move, and a roofline.

The bytes are counted in emulation, which needs a C++ compiler, and neither a GPU nor nvcc.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eopd_kernels.backends.cuda.plan import KEPT, REGISTERS, Device, Row, resident
from eopd_kernels.testing import emulation
from eopd_kernels.testing.data_sheets import DEVICES, KIB, VOCABULARIES

from .page import markdown_table, replace_block
from .traffic.model import GPUS

# Bytes per pair of logits, in logits: both sides once, or twice, and a gradient as wide as they are.
ONCE, TWICE = 3, 5
TOKENS = 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The rows of the tables that depend on logits alone.
LOGITS = [
    (name, vocab_size, Row(vocab_size, d.itemsize, d.itemsize))
    for name, d in DTYPES.items()
    for vocab_size in VOCABULARIES
]


def occupancy_table() -> str:
    """Formats where a row is kept on each GPU, by the backend's own plans."""
    header = ("logits", "V", "GPU", "kept in", "cluster", "per CTA: shared memory", "in registers")
    rows = [
        [name, f"{vocab_size:,}", device.name, *placed(row, device)]
        for name, vocab_size, row in LOGITS
        for device in DEVICES.values()
    ]
    return markdown_table((*header, "clusters side by side"), rows)


def placed(row: Row, device: Device) -> list[str]:
    plan = resident(row, device)
    if plan is None:
        return ["nothing: two visits", *["–"] * 4]
    in_registers = row.groups(plan.cluster) * row.group_columns * row.teacher_bytes
    return [
        KEPT[plan.kept],
        str(plan.cluster),
        f"{plan.shared_bytes(row) / KIB:.1f} KiB",
        f"{in_registers / KIB:.1f} KiB" if plan.kept == REGISTERS else "–",
        str(plan.per_multiprocessor(row, device)),
    ]


def traffic_table() -> str:
    """Formats the counted bytes per pair of logits, with the plans of an H100: a row that is kept, and two visits."""
    rows = []
    for logits, gradient in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for vocab_size in VOCABULARIES:
            for keeps in (True, False):
                dtypes = DTYPES[logits], DTYPES[gradient]
                moved = emulation.count_traffic(vocab_size, *dtypes, "H100", keeps)
                kept = f"{KEPT[moved.plan.kept]}, {moved.plan.cluster}"
                figures = (f"{bytes:g}" for bytes in (moved.loads, moved.stores, moved.loads + moved.stores))
                rows.append([f"{logits} → {gradient}", f"{vocab_size:,}", kept, *figures])
    return markdown_table(("logits → gradient", "V", "kept in, cluster", "loads", "stores", "together"), rows)


def roofline_table() -> str:
    """Formats the time of the bytes alone, at the data sheet's bandwidth."""
    rows = []
    for name, vocab_size, row in LOGITS:
        for gpu in GPUS:
            if gpu.name in DEVICES:
                times = [TOKENS * vocab_size * row.student_bytes * visits / gpu.memory for visits in (ONCE, TWICE)]
                once, twice = (f"{1e3 * seconds:.2f} ms" for seconds in times)
                kept = resident(row, DEVICES[gpu.name]) is not None
                rows.append([name, f"{vocab_size:,}", gpu.name, once if kept else "–", twice])
    return markdown_table(("logits", "V", "GPU", "kept on the chip", "two visits"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated blocks of this page")
    arguments = parser.parse_args()
    missing = emulation.switch_on()
    if missing is not None:
        parser.exit(2, f"{missing}\n")
    blocks = {"occupancy": occupancy_table(), "cuda traffic": traffic_table(), "roofline": roofline_table()}
    for name, table in blocks.items():
        print(table, end="\n\n")
        if arguments.write:
            replace_block(arguments.write, name, table)


if __name__ == "__main__":
    main()
