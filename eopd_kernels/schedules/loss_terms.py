"""From what the visits saw of each row to its loss and its gradient: every objective, whatever the schedule.

statistics, mixture, columns  +  gate, weights of the halves   ->   R, F, L = c_r·R + c_f·F, and ∂L/∂z_s as
                                                                    a, b, c  (docs/math.md, "One gradient form")
                                                                    and a few columns by themselves
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.record import Tokens
from ..objective.halves import Sampled, TopK
from ..objective.objective import Objective
from ..row_math.formulas import Coefficients
from ..row_math.mixture import MixtureStatistics
from ..row_math.statistics import RowStatistics, times_or_zero
from .sparse_halves import Columns, Half, cross_entropy, sampled, top_k_forward, top_k_reverse


@dataclass(frozen=True, eq=False)
class Terms:
    """The loss and the gradient of n rows of weight 1.

    Args:
        reverse, forward: ``[n]`` the halves R and F in nats; 0 where they have no weight.
        loss: ``[n]`` c_r·R + c_f·F + λ·C.
        coefficients: of the gradient, wherever a column has nothing of its own.
        own: at the columns that have: see :class:`Own`. None where no half is sparse.
    """

    reverse: Tensor
    forward: Tensor
    loss: Tensor
    coefficients: Coefficients
    own: Own | None


class Own(NamedTuple):
    """Columns with a gradient of their own: p·(a + b·…) − c·… + ``values``, with this ``a`` instead of the row's.

    What a sparse half has to say of its columns is computed at full precision and as a whole, p − q̃ and not p less q̃
    later: the row's form is often rounded to 16 bits before anything could be subtracted.
    """

    ids: Tensor  # [n, k]; a column may appear twice, then with the same value
    present: Tensor  # [n, k] bool
    a: Tensor  # [n]
    values: Tensor  # [n, k]

    def take(self, rows: Any) -> Own:
        """Returns those of some rows: a slice or an index."""
        return Own(*(part[rows] for part in self))


class RowGradient(NamedTuple):
    """What the gradient of n rows is made of: statistics, coefficients, and columns with a gradient of their own."""

    packed: Tensor  # [n, 8]
    coefficients: Coefficients
    own: Own | None

    def take(self, rows: Any) -> RowGradient:
        """Returns that of some rows: a slice or an index."""
        own = None if self.own is None else self.own.take(rows)
        return RowGradient(self.packed[rows], self.coefficients.take(rows), own)

    def times(self, upstream: Tensor) -> RowGradient:
        """Multiplies the gradient of each row by ``upstream`` [n]; it is exactly 0 where that is 0."""
        coefficients, own = Coefficients(*(times_or_zero(upstream, k) for k in self.coefficients)), self.own
        if own is not None:
            present = own.present & (upstream != 0).unsqueeze(1)
            values = times_or_zero(upstream.unsqueeze(1), own.values)
            own = Own(own.ids, present, times_or_zero(upstream, own.a), values)
        return RowGradient(self.packed, coefficients, own)

    def alive(self) -> Tensor:
        """Returns which rows have a gradient, ``[n]`` bool."""
        a, b, c = self.coefficients
        alive = (a != 0) | (b != 0) | (c != 0)
        return alive if self.own is None else alive | (self.own.values != 0).any(1)


def terms_of(
    objective: Objective,
    statistics: RowStatistics,
    gate: Tensor,  # [n]
    tokens: Tokens,
    *,
    mixture: MixtureStatistics | None = None,
    token: Columns | None = None,  # the sampled token, k = 1
    tops: Mapping[str, Columns] | None = None,  # the likeliest entries of a side, the likeliest first
) -> Terms:
    """Returns loss and gradient terms of rows with these numbers."""
    c_r, c_f = objective.combination(gate)
    c_r = c_r if tokens.reverse_weights is None else c_r * tokens.reverse_weights
    c_f = c_f if tokens.forward_weights is None else c_f * tokens.forward_weights
    served = tokens.top_ids is not None
    of_reverse, of_forward = (top_of(half, tops, served) for half in (objective.reverse, objective.forward))
    if isinstance(objective.reverse, Sampled):
        assert token is not None
        of_reverse = token
    reverse = reverse_half(objective.reverse, statistics, mixture, of_reverse, tokens)
    forward = forward_half(objective.forward, statistics, mixture, of_forward)

    a_r, a_f = times_or_zero(c_r, reverse.a), times_or_zero(c_f, forward.a)
    b = c_r if of_reverse is None else torch.zeros_like(c_r)
    c = c_f if of_forward is None else torch.zeros_like(c_f)
    reverse_value = torch.where(c_r == 0, 0.0, reverse.value)
    forward_value = torch.where(c_f == 0, 0.0, forward.value)
    loss = c_r * reverse_value + c_f * forward_value
    sparse = [(of_reverse, c_r, reverse), (of_forward, c_f, forward)]
    a = a_r + a_f
    if objective.cross_entropy != 0:
        assert token is not None
        c_ce, of_token = torch.full_like(c_r, objective.cross_entropy), cross_entropy(token)
        sparse.append((token, c_ce, of_token))
        loss, a = loss + c_ce * of_token.value, a + c_ce
    own = None
    if any(columns is not None for columns, _, _ in sparse):
        common = (a_r if of_reverse is None else 0.0) + (a_f if of_forward is None else torch.zeros_like(a_f))
        parts = [
            (columns, times_or_zero(weight.unsqueeze(1), half.own), times_or_zero(weight, half.a))
            for columns, weight, half in sparse
            if columns is not None and half.own is not None
        ]
        ids, present, values = joined(parts)
        own = Own(ids, present, common, values)
    return Terms(reverse_value, forward_value, loss, Coefficients(a, b, c), own)


def top_of(half: Any, tops: Mapping[str, Columns] | None, served: bool) -> Columns | None:
    """Returns the columns of a top-k half: its k of the likeliest entries, or all that were ``served``."""
    if not isinstance(half, TopK):
        return None
    assert tops is not None
    return tops[half.of] if served else Columns(*(part[:, : half.k] for part in tops[half.of]))


def reverse_half(
    half: Any,
    statistics: RowStatistics,
    mixture: MixtureStatistics | None,
    columns: Columns | None,  # the sampled token, or the top k
    tokens: Tokens,
) -> Half:
    """Returns the reverse half R of every row, with its gradient."""
    if isinstance(half, Sampled):
        assert columns is not None
        return sampled(half, columns, tokens)
    if isinstance(half, TopK):
        assert columns is not None
        return top_k_reverse(half, columns)
    if half == "none":
        zero = torch.zeros_like(statistics.student_sum)
        return Half(zero, zero)
    if mixture is not None:
        return Half(mixture.reverse_kl, mixture.reverse_share - mixture.reverse_kl)
    return Half(statistics.reverse_kl, -statistics.reverse_kl)


def forward_half(
    half: Any, statistics: RowStatistics, mixture: MixtureStatistics | None, columns: Columns | None
) -> Half:
    """Returns the forward half F of every row, with its gradient."""
    if isinstance(half, TopK):
        assert columns is not None
        return top_k_forward(half, columns)
    if half == "none":
        zero = torch.zeros_like(statistics.student_sum)
        return Half(zero, zero)
    if mixture is not None:
        return Half(mixture.forward_kl, mixture.forward_share)
    return Half(statistics.forward_kl, torch.ones_like(statistics.student_sum))


def joined(parts: list[tuple[Columns, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Puts the columns of the sparse halves side by side: ids, presence and values ``[n, Σk]``.

    Each part has its columns, its values there, and the ``a`` with which it acts outside of them: a column that is one
    half's own but not the other's has the other's p·a. A column of both appears twice with the same value.
    """
    ids = torch.cat([columns.ids for columns, _, _ in parts], 1)
    present = torch.cat([columns.present for columns, _, _ in parts], 1)
    p = torch.cat([columns.log_p for columns, _, _ in parts], 1).exp()
    values = torch.zeros_like(p)
    for columns, own, a in parts:
        same = (ids.unsqueeze(2) == columns.ids.unsqueeze(1)) & columns.present.unsqueeze(1)  # [n, Σk, k]
        here = torch.where(same, own.unsqueeze(1), 0.0).sum(2)
        values += torch.where(same.any(2), here, p * a.unsqueeze(1))
    return ids, present, torch.where(present, values, 0.0)
