"""The record of one call: its tensors, its options, and what the caller said of each token, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import vocabulary
from ..heads.lm_head import LMHead
from ..objective.objective import Objective


@dataclass(frozen=True, eq=False)
class Tokens:
    """``[N, ...]`` each, checked, in the compute dtype where they are numbers; None where not given.

    Args:
        token_ids: ``[N]`` the sampled token y.
        old_log_probs: ``[N]`` log p_old(y).
        gate: ``[N]`` how far the gate is open, in place of the objective's.
        reverse_weights, forward_weights: ``[N]`` factors of each half.
        top_ids, top_log_probs, top_present: ``[N, k]`` the entries of a :class:`TopKTeacher`.
        teacher_entropy: ``[N]`` as it was given, or the lower bound.
        teacher_token_log_probs: ``[N]`` log q(y).
    """

    token_ids: Tensor | None = None
    old_log_probs: Tensor | None = None
    gate: Tensor | None = None
    reverse_weights: Tensor | None = None
    forward_weights: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    top_present: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_token_log_probs: Tensor | None = None

    def take(self, rows: Any) -> Tokens:
        """Of some tokens: a slice or an index."""
        return Tokens(**{f.name: None if (t := getattr(self, f.name)) is None else t[rows] for f in fields(self)})


class Transform(NamedTuple):
    """What a head does to its logits."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Options:
    """The options of one call, checked.

    Args:
        objective, reduction, schedule, inplace, backend: as in :func:`eopd_kernels.entropy_aware_kl`, ``schedule``
            resolved.
        vocab_size: the entries of the vocabulary that are compared here.
        workspace_bytes: the budget for blocks of logits, or None for the default.
        gradient_filter: ε, or None for exact products.
        student_transform, teacher_transform: scale and softcap of each head.
        some_weigh_nothing: whether there may be tokens of weight 0.
        needs_gradient: whether autograd will ask for the gradient of student, student weight, student bias.
        autocast: the dtype of torch.autocast where the loss was called, or None.
        shard: this rank's part of a vocabulary that is spread over ranks, or None.
    """

    objective: Objective
    reduction: str
    schedule: str
    inplace: bool
    backend: str
    vocab_size: int
    workspace_bytes: int | None
    gradient_filter: float | None
    student_transform: Transform
    teacher_transform: Transform
    some_weigh_nothing: bool
    needs_gradient: tuple[bool, bool, bool]
    autocast: torch.dtype | None
    shard: vocabulary.Shard | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """Everything one call needs: its tensors and its options."""

    student: Tensor
    teacher: Tensor | None  # None: a TopKTeacher, whose entries are in tokens
    student_head: LMHead | None
    teacher_head: LMHead | None
    weights: Tensor  # [N], 0 where masked
    denominator: Tensor | None  # 0-d; None for "sum" and "none"
    tokens: Tokens
    options: Options

    @property
    def leading(self) -> torch.Size:
        """The leading shape, that of the per-token outputs."""
        return self.student.shape[:-1]
