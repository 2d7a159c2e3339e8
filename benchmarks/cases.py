"""The cases of the ratio table: what runs beside what, and the target. Each measures in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eopd_kernels import memory as fresh_memory

from .measure import MIB, THREADS, Sample, fresh_process, interleaved, peak_memory, progress
from .problems import hidden_problem, logits_problem
from .results import Row, Target, compared
from .steps import (
    Step,
    chunk_tokens,
    fused_hidden,
    fused_logits,
    grad_hidden_product,
    inplace_logits,
    plain_hidden,
    plain_logits,
    products,
    row_kernel,
)


@dataclass(frozen=True)
class Scale:
    """The shapes of a run and how long each case is repeated.

    Args:
        rows, logits_vocab: of the logits.
        tokens, long_tokens, vocab, dim: of the hidden states; ``long_tokens`` for memory only.
        seconds: see :func:`benchmarks.measure.interleaved`.
    """

    rows: int
    logits_vocab: int
    tokens: int
    long_tokens: int
    vocab: int
    dim: int
    seconds: float

    @property
    def logits(self) -> str:
        return f"logits {self.rows:,} x {self.logits_vocab:,} fp32"

    def hidden(self, dtype: str = "fp32", tokens: int | None = None) -> str:
        return f"hidden states N={tokens or self.tokens:,}, V={self.vocab:,}, D={self.dim:,} {dtype}"


PUBLISHED = Scale(256, 151_936, 2_048, 16_384, 49_152, 576, seconds=90)
QUICK = Scale(32, 16_384, 256, 512, 4_096, 128, seconds=1)
# Tokens of the single product that is timed in bf16 and in fp32.
BF16_CHUNK = 128


def logits(scale: Scale) -> list[Row]:
    times = fresh_process(time_logits, scale)
    case = f"{scale.logits}, loss + gradient"
    against, target = "plain PyTorch, eager", Target("faster", 25)
    return [
        compared(case, against, target, times["fused"], times["plain"]),
        compared(f"{case}, inplace=True", against, target, times["inplace"], times["plain"]),
    ]


def time_logits(scale: Scale) -> dict[str, Sample]:
    problem = logits_problem(scale.rows, scale.logits_vocab)
    return interleaved(
        {"plain": plain_logits(problem), "fused": fused_logits(problem), "inplace": inplace_logits(problem)},
        scale.seconds,
    )


def compiled(scale: Scale) -> list[Row]:
    times = fresh_process(time_compiled, scale)
    case = f"{scale.logits}, loss + gradient"
    against, target = "plain PyTorch, torch.compile", Target("faster", 8)
    return [
        compared(case, against, target, times["fused"], times["compiled"]),
        compared(f"{case}, inplace=True", against, target, times["inplace"], times["compiled"]),
    ]


def time_compiled(scale: Scale) -> dict[str, Sample]:
    problem = logits_problem(scale.rows, scale.logits_vocab)
    steps = {
        "compiled": plain_logits(problem, compiled=True),
        "fused": fused_logits(problem),
        "inplace": inplace_logits(problem),
    }
    return interleaved(steps, scale.seconds)


def add(scale: Scale) -> list[Row]:
    times = fresh_process(time_add, scale)
    against, target = "torch.add(a, b, out=c)", Target("its time", 1.8)
    return [
        compared(f"{scale.logits}, row_loss_and_gradient into out", against, target, times["kernel"], times["add"]),
        compared(f"{scale.logits}, entropy_aware_kl + backward", against, target, times["fused"], times["add"]),
        compared(f"{scale.logits}, the same with inplace=True", against, target, times["inplace"], times["add"]),
        compared(f"{scale.logits}, first touch of a new gradient", against, None, times["first touch"], times["add"]),
        compared(f"{scale.logits}, the same in huge pages", against, None, times["huge pages"], times["add"]),
        compared(f"{scale.logits}, gradient scaled in place", against, None, times["scale"], times["add"]),
    ]


def time_add(scale: Scale) -> dict[str, Sample]:
    problem = logits_problem(scale.rows, scale.logits_vocab)
    a, b, c = problem.student.detach(), problem.teacher, torch.zeros_like(problem.teacher)
    factor = torch.tensor(0.999)
    steps: dict[str, Step] = {
        "add": lambda: torch.add(a, b, out=c),
        "kernel": row_kernel(problem, c),
        "fused": fused_logits(problem),
        "inplace": inplace_logits(problem),
        "first touch": lambda: torch.empty_like(a).fill_(1),
        "huge pages": lambda: fresh_memory.empty(a.shape, a.dtype, a.device).fill_(1),
        "scale": lambda: c.mul_(factor),
    }
    return interleaved(steps, scale.seconds)


def hidden(scale: Scale) -> list[Row]:
    times = fresh_process(time_hidden, scale)
    case = f"{scale.hidden()}, loss + dX + dW"
    alone = "its four products alone, in the same chunks"
    whole = "the four products, all tokens at once"
    return [
        compared(case, alone, Target("its time", 1.1), times["fused"], times["products"]),
        compared(case, "plain PyTorch, eager", Target("faster", 1.5), times["fused"], times["plain"]),
        compared(f"{scale.hidden()}, four products in chunks", whole, None, times["products"], times["unchunked"]),
    ]


def time_hidden(scale: Scale) -> dict[str, Sample]:
    problem = hidden_problem(scale.tokens, scale.vocab, scale.dim)
    steps = {
        "products": products(problem, chunk_tokens(problem)),
        "fused": fused_hidden(problem),
        "plain": plain_hidden(problem),
        "unchunked": products(problem, scale.tokens),
    }
    return interleaved(steps, scale.seconds)


def memory(scale: Scale) -> list[Row]:
    target = Target("MiB", 160)
    shape = (scale.vocab, scale.dim)
    fused = hidden_peak("fused", scale.tokens, *shape)
    fused_long = hidden_peak("fused", scale.long_tokens, *shape)
    plain = hidden_peak("plain", scale.tokens, *shape)
    beyond = "peak memory beyond inputs, dX and dW"
    case = f"{scale.hidden()}, {beyond}"
    return [
        Row(case, "–", target, fused, fused),
        Row(f"{scale.hidden(tokens=scale.long_tokens)}, {beyond}", "–", target, fused_long, fused_long),
        compared(case, "plain PyTorch, eager", Target("less memory", 15), fused, plain),
    ]


HIDDEN_STEPS: dict[str, Callable[..., Step]] = {"fused": fused_hidden, "plain": plain_hidden}


def hidden_peak(contender: str, tokens: int, vocab: int, dim: int, **options: int) -> Sample:
    """MiB of a contender of HIDDEN_STEPS beyond its inputs and gradients."""
    peak = fresh_process(peak_beyond_results, contender, tokens, vocab, dim, **options)
    sample = Sample((peak / MIB,), "MiB")
    progress(f"  {contender}, {tokens:,} tokens: {sample}")
    return sample


def peak_beyond_results(contender: str, tokens: int, vocab: int, dim: int, **options: int) -> int:
    torch.set_num_threads(THREADS)
    prepare = HIDDEN_STEPS[contender]
    prepare(hidden_problem(8, 64, 16))()  # thread pools and the products' own buffers are there from now on
    problem = hidden_problem(tokens, vocab, dim)
    results = problem.student.nbytes + problem.student_weight.nbytes
    return peak_memory(prepare(problem, **options)) - results


def bf16(scale: Scale) -> list[Row]:
    times = fresh_process(time_bf16, scale)
    case = f"{scale.hidden('bf16')}, loss + dX + dW"
    product = f"{scale.hidden('bf16', BF16_CHUNK)}, the product behind dX"
    return [
        compared(case, "plain PyTorch in bf16, eager", Target("faster", 15), times["fused"], times["plain"]),
        compared(product, "the same in fp32", None, times["dX in bf16"], times["dX in fp32"]),
    ]


def time_bf16(scale: Scale) -> dict[str, Sample]:
    problem = hidden_problem(scale.tokens, scale.vocab, scale.dim, torch.bfloat16)
    steps = {
        "plain": plain_hidden(problem),
        "fused": fused_hidden(problem),
        "dX in bf16": grad_hidden_product(problem, BF16_CHUNK, torch.bfloat16),
        "dX in fp32": grad_hidden_product(problem, BF16_CHUNK, torch.float32),
    }
    return interleaved(steps, scale.seconds)


CASES: dict[str, Callable[[Scale], list[Row]]] = {
    "logits": logits,
    "compile": compiled,
    "add": add,
    "hidden": hidden,
    "memory": memory,
    "bf16": bf16,
}
