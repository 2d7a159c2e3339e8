"""Single columns of a block: reads their logits, writes their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_math.formulas import (
    Coefficients,
    column_gradient,
    mixture_column_gradient,
    transform_slope,
    transformed,
    unused,
)
from ..row_math.mixture import Skews
from ..row_math.statistics import RowStatistics
from .blocks import Block
from .loss_terms import Own, RowGradient
from .problem import Problem
from .sides import Rows


def transformed_at(block: Tensor, ids: Tensor, start: int, transform: Sequence[float], into: Tensor) -> Tensor:
    """Reads transformed logits of the columns ``ids`` [n, k] out of ``block`` [n, w], whose first column is ``start``.

    The result has the dtype of ``into`` [n, k], whose values remain for columns outside of the block.
    """
    local, inside = within(block, ids, start)
    return torch.where(inside, transformed(block.gather(1, local), transform, into.dtype), into)


def token_logits(problem: Problem, block: Block, rows: Rows) -> tuple[Tensor, Tensor]:
    """Reads the sampled tokens' transformed logits ``[n, 1]`` of both sides out of a block of whole rows."""
    assert problem.tokens.token_ids is not None
    ids, dtype = problem.tokens.token_ids[rows].unsqueeze(1), problem.weights.dtype
    of_student, of_teacher = problem.transforms[:3], problem.transforms[3:]
    return (
        transformed(block.student.gather(1, ids), of_student, dtype),
        transformed(block.teacher.gather(1, ids), of_teacher, dtype),
    )


def within(block: Tensor, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Returns the places of columns ``ids`` [n, k] in ``block`` [n, w], any if none, and whether they have one."""
    local = ids - start
    inside = (local >= 0) & (local < block.shape[1])
    return local.clamp(0, block.shape[1] - 1), inside


@dataclass(frozen=True, eq=False)
class Patch:
    """A block's gradient at single columns, taken before the kernel may overwrite the logits, written afterwards."""

    local: Tensor  # [n, k]
    inside: Tensor  # [n, k] bool
    gradient: Tensor  # [n, k]

    @classmethod
    def of(cls, problem: Problem, block: Block, start: int, rows: RowGradient, own: Own) -> Patch:
        """Takes the gradient at the columns of ``own``."""
        transforms, skews = problem.transforms, problem.objective.skews
        local, inside = within(block.student, own.ids, problem.offset + start)
        dtype = own.values.dtype
        z_s = transformed(block.student.gather(1, local), transforms[:3], dtype)
        z_t = transformed(block.teacher.gather(1, local), transforms[3:], dtype)
        per_row = Coefficients(*(k.unsqueeze(1) for k in (own.a, rows.coefficients.b, rows.coefficients.c)))
        at_columns = RowStatistics(rows.packed).probabilities(z_s, z_t)
        if skews is None:
            common = column_gradient(*at_columns, per_row)
        else:
            common = mixture_column_gradient(*at_columns, per_row, Skews(*skews))
        gradient = (torch.where(unused(per_row), 0.0, common) + own.values) * transform_slope(z_s, transforms[:3])
        return cls(local, inside & own.present, gradient)

    def write(self, out: Tensor) -> None:
        """Writes the gradient into ``out`` [n, w].

        Which entries are inside is not asked, because that would wait for a GPU: the others repeat what the row's first
        one inside writes, or what stands there where it has none.
        """
        first = self.inside.to(torch.uint8).argmax(1, keepdim=True)  # [n, 1]
        there = torch.where(self.inside.any(1, keepdim=True), self.gradient.gather(1, first), out[:, :1])
        column = torch.where(self.inside.any(1, keepdim=True), self.local.gather(1, first), 0)
        out.scatter_(
            1,
            torch.where(self.inside, self.local, column),
            torch.where(self.inside, self.gradient, there).to(out.dtype),
        )


def block_gradient(problem: Problem, block: Block, start: int, rows: RowGradient, out: Tensor) -> None:
    """Takes the gradient of a block that begins ``start`` columns into this rank's part, into ``out`` [n, k].

    The kernel writes the row's form, and then the columns of ``own`` are overwritten. ``out`` may be the student's
    logits.
    """
    functions, transforms, skews = problem.functions, problem.transforms, problem.objective.skews
    patch = None if rows.own is None else Patch.of(problem, block, start, rows, rows.own)
    if skews is None:
        functions.row_gradient(*block, rows.packed, *rows.coefficients, transforms, out)
    else:
        functions.row_mixture_gradient(*block, rows.packed, *rows.coefficients, list(skews), transforms, out)
    if patch is not None:
        patch.write(out)
