"""The counts as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..results import markdown_table
from .contenders import Contender
from .counter import Traffic
from .model import FP32, GPUS, PUBLISHED, l2_share, seconds

Counts = Mapping[Contender, Traffic | str]


def bytes_table(counts: Counts) -> str:
    header = (
        "what",
        "version",
        "logits in",
        "kernels load",
        "kernels store",
        "kernels together",
        "torch between them",
        "in and out of products",
        "products",
    )
    rows: list[Sequence[str]] = []
    for contender, count in counts.items():
        if isinstance(count, str):
            rows.append([contender.name, contender.version or "–", f"not counted: {count}", *["–"] * 6])
            continue
        of_student, of_teacher = count.units
        figures = (
            sum(count.loads.values()),
            sum(count.stores.values()),
            count.kernel_bytes,
            count.torch_bytes,
            count.product_bytes,
        )
        per_logit = [number(count.per_logit(figure)) for figure in figures]
        flops = f"F({number(of_student)}·D_s + {number(of_teacher)}·D_t)"
        logits = f"{8 * count.logit_bytes} bits"
        rows.append([contender.name, contender.version or "–", logits, *per_logit, flops])
    return markdown_table(header, rows)


def kernels_table(counts: Counts) -> str:
    """Who moves them: a line per kernel."""
    rows = []
    for contender, count in counts.items():
        if isinstance(count, Traffic):
            for kernel in sorted({*count.loads, *count.stores}):
                loads, stores = count.loads.get(kernel, 0), count.stores.get(kernel, 0)
                if loads or stores:
                    figures = (number(count.per_logit(loads)), number(count.per_logit(stores)))
                    rows.append([contender.name, f"`{kernel}`", *figures])
    return markdown_table(("what", "kernel", "loads", "stores"), rows)


def model_table(counts: Counts) -> str:
    size = PUBLISHED
    rows = [
        [contender.name, *(f"{1e3 * seconds(gpu, size, count):.0f} ms" for gpu in GPUS)]
        for contender, count in counts.items()
        if isinstance(count, Traffic) and contender.dtype == torch.bfloat16
    ]
    return markdown_table(("model, not measured", *(gpu.name for gpu in GPUS)), rows)


def l2_table() -> str:
    """What of a second visit L2 can hold, by the size of the vocabulary."""
    rows = []
    for vocab in (32_000, 128_256, 151_936, 262_144):
        row_bytes = 2 * FP32 * vocab
        for gpu in GPUS:
            shares = [f"{100 * l2_share(gpu, vocab, resident):.0f} %" for resident in (1, 4, 8)]
            rows.append([f"{vocab:,}", f"{row_bytes / 2**20:.2f} MiB", gpu.name, f"{gpu.l2 / row_bytes:.0f}", *shares])
    header = (
        "V",
        "a row, both sides",
        "GPU",
        "rows that fit in L2",
        "hits with 1 row per multiprocessor",
        "with 4",
        "with 8",
    )
    return markdown_table(header, rows)


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
