"""How the CUDA backend shares a row out on each GPU, by its own plans: arithmetic on data sheets."""

from __future__ import annotations

from collections.abc import Sequence

from eopd_kernels.backends.cuda.plan import KEPT, REGISTERS, Device, Plan, Row, resident

from ..results import markdown_table
from ..traffic.model import GPUS

KIB = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors from the data sheets.
DEVICES = {
    "A100": Device("A100", (8, 0), 108, 1024, 1, 163 * KIB, 164 * KIB),
    "H100": Device("H100", (9, 0), 132, 1024, 16, 227 * KIB, 228 * KIB),
    "B200": Device("B200", (10, 0), 148, 1024, 16, 227 * KIB, 228 * KIB),
    "RTX 5090": Device("RTX 5090", (12, 0), 170, 1024, 8, 99 * KIB, 100 * KIB),
}
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
# Bytes per logit pair, read and written: both sides once, or twice, and a gradient as wide as they are.
ONCE, TWICE = 3, 5
TOKENS = 8192


def occupancy_table() -> str:
    header = (
        "logits",
        "V",
        "GPU",
        "kept in",
        "cluster",
        "per CTA: shared memory",
        "in registers",
        "clusters side by side",
    )
    rows = []
    for itemsize, name in ((4, "fp32"), (2, "bf16")):
        for vocab_size in VOCABULARIES:
            row = Row(vocab_size, itemsize, itemsize)
            for device in DEVICES.values():
                rows.append([name, f"{vocab_size:,}", device.name, *placed(row, device, resident(row, device))])
    return markdown_table(header, rows)


def placed(row: Row, device: Device, plan: Plan | None) -> Sequence[str]:
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


def roofline_table() -> str:
    """The bytes alone, at the data sheet's bandwidth."""
    rows = []
    for itemsize, name in ((4, "fp32"), (2, "bf16")):
        for vocab_size in VOCABULARIES:
            for gpu in GPUS:
                if gpu.name not in DEVICES:
                    continue
                kept = resident(Row(vocab_size, itemsize, itemsize), DEVICES[gpu.name]) is not None
                times = [TOKENS * vocab_size * itemsize * visits / gpu.memory for visits in (ONCE, TWICE)]
                once, twice = (f"{1e3 * seconds:.2f} ms" for seconds in times)
                rows.append([name, f"{vocab_size:,}", gpu.name, once if kept else "–", twice])
    return markdown_table(("logits", "V", "GPU", "kept on the chip", "two visits"), rows)
