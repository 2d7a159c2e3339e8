"""Call: the record of one call of the loss, checked: its tensors, its options, and what was said of each token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.vocabulary import Shard
from ..heads.lm_head import LMHead, tensors_of
from ..objective.objective import Objective


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the caller said of each token beside the two sides: checked, ``[N, ...]``, numbers in the compute dtype.

    Args:
        token_ids: ``[N]`` the sampled token y. Default, here and below: None, not given.
        old_log_probs: ``[N]`` log p_old(y).
        advantages: ``[N]`` in place of log q(y) − log p_old(y).
        gate: ``[N]`` how far the gate is open, in place of the objective's.
        reverse_weights, forward_weights: ``[N]`` factors of each half.
        top_ids, top_log_probs, top_present: ``[N, k]`` the entries of a :class:`TopKTeacher`.
        teacher_entropy: ``[N]`` as it was given, or the lower bound.
        teacher_token_log_probs: ``[N]`` log q(y), NaN where the :class:`TopKTeacher` does not know it.
    """

    token_ids: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    gate: Tensor | None = None
    reverse_weights: Tensor | None = None
    forward_weights: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    top_present: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_token_log_probs: Tensor | None = None

    def take(self, rows: Any) -> Tokens:
        """Returns what was said of some tokens: a slice or an index."""
        return Tokens(**{f.name: None if (t := getattr(self, f.name)) is None else t[rows] for f in fields(self)})


@dataclass(frozen=True)
class Options:
    """The options of one call.

    Args:
        objective, reduction, schedule, inplace, backend: as in :func:`eopd_kernels.entropy_aware_kl`, ``schedule``
            resolved.
        local_vocab_size: the entries of the vocabulary that are compared on this rank.
        workspace_bytes: the budget for blocks of logits, or None for the default.
        gradient_filter: ε, or None for exact products.
        some_weigh_nothing: whether there may be tokens of weight 0.
        wait_free: whether nothing may wait for the device.
        needs_gradient: whether autograd will ask for the gradient of student, student weight, student bias.
        autocast: the dtype of torch.autocast where the loss was called, or None.
        shard: this rank's part of a vocabulary that is spread over ranks, or None.
    """

    objective: Objective
    reduction: str
    schedule: str
    inplace: bool
    backend: str
    local_vocab_size: int
    workspace_bytes: int | None
    gradient_filter: float | None
    some_weigh_nothing: bool
    wait_free: bool
    needs_gradient: tuple[bool, bool, bool]
    autocast: torch.dtype | None
    shard: Shard | None = None


Sides = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Call:
    """Everything that one call needs.

    Args:
        student: ``[..., V]`` or, with a head, ``[..., D_s]``.
        teacher: ``[..., V]`` or, with a head, ``[..., D_t]``. None: a :class:`TopKTeacher`, which is in ``tokens``, or
            no teacher at all, of which these hold NaN.
        student_head, teacher_head: the heads, or None for logits.
        weights: ``[N]`` of the tokens, in the compute dtype; 0 where masked.
        denominator: 0-d, of the mean; None for "sum" and "none".
        tokens: what was said of each token.
        options: everything else.
    """

    student: Tensor
    teacher: Tensor | None
    student_head: LMHead | None
    teacher_head: LMHead | None
    weights: Tensor
    denominator: Tensor | None
    tokens: Tokens
    options: Options

    @property
    def leading(self) -> torch.Size:
        """The leading shape, that of the per-token outputs."""
        return self.student.shape[:-1]

    def differentiable(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns what may have a gradient: the student, the weight and the bias of its head."""
        return self.student, *tensors_of(self.student_head)

    def sides(self) -> Sides:
        """Returns both sides: student, weight, bias, teacher, weight, bias."""
        return *self.differentiable(), self.teacher, *tensors_of(self.teacher_head)

    def without_sides(self) -> Call:
        """Returns the call without the memory of its sides, as a graph may hold it, for :meth:`with_sides`."""
        empty = [None if t is None else t.detach().new_empty([0] * t.dim()) for t in self.sides()]
        return replace(self.with_sides(empty), tokens=Tokens())

    def with_sides(self, sides: Any) -> Call:
        """Returns the same call of other tensors, in the order of :meth:`sides`; None where there are none."""
        student, weight, bias, teacher, teacher_weight, teacher_bias = sides
        student_head = self.student_head and self.student_head.with_tensors(weight, bias)
        teacher_head = self.teacher_head and self.teacher_head.with_tensors(teacher_weight, teacher_bias)
        return replace(self, student=student, student_head=student_head, teacher=teacher, teacher_head=teacher_head)
