"""A model small enough to train on each of several ranks, and a batch whose valid tokens lie unevenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eopd_kernels import LMHead, Objective, entropy_aware_kl

V, D, D_T = 37, 8, 12  # V is divisible by no number of ranks
SEQUENCES, LENGTH = 8, 6


class Student(nn.Module):
    """Looks at each token alone, so that a sequence may be cut anywhere."""

    def __init__(self, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(ids)).tanh()


class Batch:
    """``ids`` and ``mask`` [8, 6], teacher's hidden states [8, 6, D_t] and head. Sequences 4 and 5 are all masked, and
    so are the last three positions of sequences 6 and 7."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(V, (SEQUENCES, LENGTH), generator=generator)
        self.teacher = 2 * torch.randn(SEQUENCES, LENGTH, D_T, generator=generator)
        self.teacher_weight = torch.randn(V, D_T, generator=generator)
        self.mask = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.3
        self.mask[4:6] = False
        self.mask[6:, 3:] = False


def loss_of(
    student: Any,  # called with ids, and with an lm_head
    batch: Batch,
    part: tuple[slice, slice] = (slice(None), slice(None)),
    num_items: Tensor | None = None,
    **options: str,
) -> Tensor:
    """The loss of a part of the batch."""
    weight, bias = student.lm_head.weight, student.lm_head.bias
    return entropy_aware_kl(
        student(batch.ids[part]),
        batch.teacher[part],
        student_head=LMHead(weight, bias),
        teacher_head=LMHead(batch.teacher_weight),
        mask=batch.mask[part],
        num_items=num_items,
        objective=Objective(),
        **options,  # type: ignore[arg-type]
    ).loss


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in student.named_parameters()}  # type: ignore[union-attr]
