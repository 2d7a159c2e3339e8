"""What the counted bytes and flops would take at a GPU's data-sheet rates. A model: nothing of it was measured."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Size:
    """The problem that the model is asked about."""

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int


PUBLISHED = Size(8192, 151_936, 1024, 4096)


def seconds(gpu: Gpu, size: Size, traffic: Traffic) -> float:
    """Products at the bf16 rate or at the memory's, whichever takes longer; then everything else at the memory's.

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
    """The share of the second visit's loads that can still lie in L2, if it walks a row back from where it ended.

    As many rows as run at a time have passed through L2 together; what it still holds is the end of each.
    """
    row = 2 * FP32 * vocab
    return min(1.0, gpu.l2 / (gpu.multiprocessors * rows_per_multiprocessor * row))
