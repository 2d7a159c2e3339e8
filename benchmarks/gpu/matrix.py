"""The cells of the matrix: sizes times contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from eopd_kernels import LMHead, entropy_aware_kl
from eopd_kernels.rows import BACKENDS, choose

from .. import plain
from ..peers import PEERS
from ..problems import HiddenProblem


@dataclass(frozen=True)
class Size:
    """One problem: N tokens, the vocabulary, and both heads' hidden dimensions."""

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int

    def __str__(self) -> str:
        return f"N={self.tokens:,} V={self.vocab:,} D={self.student_dim:,}/{self.teacher_dim:,}"


HEADS = ((1024, 4096), (2048, 4096))
SIZES = [Size(n, v, *heads) for v, heads, n in product((128_256, 151_936, 262_144), HEADS, (1024, 4096, 8192))]
TINY = [Size(6, 130, 8, 12), Size(9, 70, 8, 12)]


@dataclass(frozen=True)
class Contender:
    """Something that is run on every size.

    Args:
        name: as in the report.
        divergence: what it computes, a key of :data:`benchmarks.gpu.truth.TRUTHS` or words.
        loss: the mean over the tokens of a problem.
        ours: whether it is held to the checks.
        version: None where it is not installed.
    """

    name: str
    divergence: str
    loss: Callable[[HiddenProblem], Tensor]
    ours: bool = False
    version: str | None = ""


def ours(backend: str, schedule: str) -> Contender:
    def loss(problem: HiddenProblem) -> Tensor:
        return entropy_aware_kl(
            problem.student,
            problem.teacher,
            student_head=LMHead(problem.student_weight),
            teacher_head=LMHead(problem.teacher_weight),
            schedule=schedule,
            backend=backend,
        ).loss

    return Contender(f"eopd_kernels {backend}, {schedule}", "gated", loss, ours=True)


def of_plain(problem: HiddenProblem) -> Tensor:
    return plain.hidden_loss(problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)


def contenders(device: torch.device) -> list[Contender]:
    """Every backend of the package that takes this device's tensors, plain PyTorch, and the peers."""
    own = [ours(backend, "chunked") for backend in backends(device)]
    fastest = next(iter(backends(device)))
    peers = [Contender(p.name, p.divergence, p.loss, version=p.version) for p in PEERS]
    return [*own, ours(fastest, "recompute"), Contender("plain PyTorch", "gated", of_plain), *peers]


def backends(device: torch.device) -> list[str]:
    """Kernels first; a backend for another kind of device refuses."""
    taken = []
    for name in sorted(BACKENDS, key=lambda name: name == "torch"):
        try:
            choose(name, device)
        except ValueError:
            continue
        taken.append(name)
    return taken


def problem(size: Size, device: torch.device) -> HiddenProblem:
    """bf16, logits with a standard deviation of 1 to 4 from token to token, so that gates are open and closed."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def side(dim: int) -> tuple[Tensor, Tensor]:
        sharpness = torch.linspace(1, 4, size.tokens, device=device).unsqueeze(1)
        weight = torch.empty(size.vocab, dim, dtype=torch.bfloat16, device=device)
        for part in weight.split(2**14):  # a head of 262,144 x 4,096 is not made in fp32
            part.copy_(random(*part.shape) / dim**0.5)
        return (random(size.tokens, dim) * sharpness).bfloat16(), weight

    student, student_weight = side(size.student_dim)
    teacher, teacher_weight = side(size.teacher_dim)
    return HiddenProblem(student.requires_grad_(), teacher, student_weight.requires_grad_(), teacher_weight)
