"""``python -m benchmarks.traffic``: the bytes and flops of the loss and of the installed peers, counted on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from eopd_kernels.testing.data_sheets import VOCABULARIES

from ..machine import command
from ..page import block, markdown_table, replace_block
from ..problems import Shape
from .contenders import ENTRIES, Entry, count
from .counter import Traffic
from .model import FP32, GPUS, PUBLISHED, l2_share, seconds

SUMMARY = "Bytes per logit and flops per token of the loss and of its installed peers, counted in Triton's interpreter."
# Long enough that the figures of a row do not show, short enough for the interpreter; a multiple of no peer's tile.
TOKENS, VOCAB, STUDENT_DIM, TEACHER_DIM = 16, 8_200, 24, 40

Counts = Mapping[Entry, Traffic | str]


def bytes_table(counts: Counts) -> str:
    """Formats the bytes per logit, a line per contender."""
    what = ("kernels load", "kernels store", "kernels together", "torch between them", "in and out of products")
    rows = []
    for entry, found in counts.items():
        version = entry.contender.version or "–"
        if isinstance(found, str):
            rows.append([entry.name, version, f"not counted: {found}", *["–"] * 6])
            continue
        loads, stores = sum(found.loads.values()), sum(found.stores.values())
        figures = (loads, stores, found.kernel_bytes, found.torch_bytes, found.product_bytes)
        per_logit = [number(found.per_logit(figure)) for figure in figures]
        of_student, of_teacher = map(number, found.units)
        flops = f"F({of_student}·D_s + {of_teacher}·D_t)"
        rows.append([entry.name, version, f"{8 * found.logit_bytes} bits", *per_logit, flops])
    return markdown_table(("what", "version", "logits in", *what, "products"), rows)


def kernels_table(counts: Counts) -> str:
    """Formats the bytes per logit, a line per kernel."""
    rows = []
    for entry, found in counts.items():
        if isinstance(found, Traffic):
            for kernel in sorted({*found.loads, *found.stores}):
                moved = [of.get(kernel, 0) for of in (found.loads, found.stores)]
                if any(moved):
                    rows.append([entry.name, f"`{kernel}`", *(number(found.per_logit(bytes)) for bytes in moved)])
    return markdown_table(("what", "kernel", "loads", "stores"), rows)


def model_table(counts: Counts) -> str:
    """Formats the modelled time of the published size on each GPU."""
    rows = [
        [entry.name, *(f"{1e3 * seconds(gpu, PUBLISHED, found):.0f} ms" for gpu in GPUS)]
        for entry, found in counts.items()
        if isinstance(found, Traffic) and entry.dtype == torch.bfloat16
    ]
    return markdown_table(("model, not measured", *(gpu.name for gpu in GPUS)), rows)


def l2_table() -> str:
    """Formats how much of a second visit L2 can hold, by the size of the vocabulary."""
    rows = []
    for vocab in VOCABULARIES:
        row_bytes = 2 * FP32 * vocab
        for gpu in GPUS:
            shares = [f"{100 * l2_share(gpu, vocab, resident):.0f} %" for resident in (1, 4, 8)]
            rows.append([f"{vocab:,}", f"{row_bytes / 2**20:.2f} MiB", gpu.name, f"{gpu.l2 / row_bytes:.0f}", *shares])
    header = ("V", "a row, both sides", "GPU", "rows that fit in L2")
    return markdown_table((*header, "hits with 1 row per multiprocessor", "with 4", "with 8"), rows)


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=SUMMARY)
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose name contains TEXT")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated block of this page")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.exit(2, "Triton is not installed: there is nothing that its interpreter could count.\n")
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    warnings.simplefilter("ignore")  # peers warn of the missing GPU
    shape = Shape(arguments.tokens, arguments.vocab, STUDENT_DIM, TEACHER_DIM)
    counts = {entry: count(entry, shape) for entry in ENTRIES if arguments.only in entry.name}
    facts = {
        "command": f"`{command('benchmarks.traffic')}`",
        "counted on": f"{shape.tokens} tokens, V = {shape.vocab:,}, D_s = {STUDENT_DIM}, D_t = {TEACHER_DIM}",
    }
    parts = [
        "Bytes per logit (a token and an entry of the vocabulary), F = 2·N·V:",
        bytes_table(counts),
        "By kernel:",
        kernels_table(counts),
        "Roofline, a model and no measurement: N = 8,192, V = 151,936, D_s = 1,024, D_t = 4,096, data-sheet rates, "
        "every byte from memory, no launches, no overlap:",
        model_table(counts),
        "What of the second visit's loads L2 can hold, a model as well (fp32 logits; the visit walks back):",
        l2_table(),
    ]
    text = block(facts, parts)
    print(text)
    if arguments.write:
        replace_block(arguments.write, "traffic", text)


if __name__ == "__main__":
    main()
