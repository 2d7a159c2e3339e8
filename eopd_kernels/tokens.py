"""Tokens: what a caller says of each token beside the two sides of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


def rows_of(tensor: Tensor, *inner: int) -> Tensor:
    """A tensor of any strides as rows ``[N, *inner]`` that lie one after another, as the kernels read them."""
    return tensor.reshape(-1, *inner).contiguous()


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
