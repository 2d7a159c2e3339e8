"""Models the time of the counted bytes and flops at a GPU's data-sheet rates. Nothing of it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..problems import Shape
from .counter import Traffic

FP32 = 4


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense bf16 rate in flop/s, memory in byte/s, L2 in bytes."""

    name: str
    bf16: float
    memory: float
    l2: float
    multiprocessors: int


GPUS = [
    Gpu("A100", 312e12, 2.04e12, 40e6, 108),
    Gpu("H100", 989e12, 3.35e12, 50e6, 132),
    Gpu("H200", 989e12, 4.8e12, 50e6, 132),
    Gpu("B200", 2250e12, 8e12, 126e6, 148),
]


PUBLISHED = Shape(8192, 151_936, 1024, 4096)


def seconds(gpu: Gpu, size: Shape, traffic: Traffic) -> float:
    """Adds up the products, at the bf16 rate or the memory's, whichever is slower, and the rest at the memory's rate.

    All bytes come from and go to memory, nothing overlaps, no launch takes time, and what is not of the size of the
    logits (hidden states, heads, dW) is free.
    """
    logits = size.tokens * size.vocab
    of_student, of_teacher = traffic.units
    flops = 2 * logits * (of_student * size.student_dim + of_teacher * size.teacher_dim)
    products = max(flops / gpu.bf16, traffic.per_logit(traffic.product_bytes) * logits / gpu.memory)
    others = traffic.per_logit(traffic.kernel_bytes + traffic.torch_bytes) * logits / gpu.memory
    return products + others


def l2_share(gpu: Gpu, vocab: int, rows_per_multiprocessor: int) -> float:
    """Returns the share of the second visit's loads that L2 can still hold, if the visit walks a row backwards.

    As many rows as run at a time have passed through L2 together; what it still holds is the end of each.
    """
    row = 2 * FP32 * vocab
    return min(1.0, gpu.l2 / (gpu.multiprocessors * rows_per_multiprocessor * row))
