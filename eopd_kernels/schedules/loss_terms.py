"""From what the visits saw of each row to its loss and its gradient: every objective, whatever the schedule.

statistics, mixture, columns  +  gate, weights of the halves   ->   R, F, L = c_r·R + c_f·F, and ∂L/∂z_s as
                                                                    a, b, c  (docs/math.md, "One gradient form")
                                                                    and a few columns by themselves
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.record import Tokens
from ..objective.halves import Sampled, Skewed, TopK
from ..objective.objective import Objective
from ..row_math.formulas import Coefficients
from ..row_math.mixture import MixtureStatistics
from ..row_math.statistics import RowStatistics, times_or_zero


class Columns(NamedTuple):
    """A few columns of each row: which, whether they count, and the log-probabilities there."""

    ids: Tensor  # [n, k]
    present: Tensor  # [n, k] bool
    log_p: Tensor  # [n, k] log-probabilities of the student
    log_q: Tensor  # [n, k] of the teacher


@dataclass(frozen=True, eq=False)
class Terms:
    """The loss and the gradient of n rows of weight 1.

    Args:
        reverse, forward: ``[n]`` the halves R and F in nats; 0 where they have no weight.
        loss: ``[n]`` c_r·R + c_f·F.
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


class Half(NamedTuple):
    """One half of the loss in n rows: its value and its share of the gradient, for a weight of 1."""

    value: Tensor  # [n]
    a: Tensor  # [n]: its p·a, outside its own columns where it is sparse
    own: Tensor | None = None  # [n, k] at its own columns, instead of p·a


def terms_of(
    objective: Objective,
    statistics: RowStatistics,
    gate: Tensor,  # [n]
    tokens: Tokens,
    *,
    mixture: MixtureStatistics | None = None,
    token: Columns | None = None,  # the sampled token, k = 1
    top: Columns | None = None,  # the teacher's top k
) -> Terms:
    """Returns loss and gradient terms of rows with these numbers."""
    c_r, c_f = objective.combination(gate)
    c_r = c_r if tokens.reverse_weights is None else c_r * tokens.reverse_weights
    c_f = c_f if tokens.forward_weights is None else c_f * tokens.forward_weights
    reverse = reverse_half(objective.reverse, statistics, mixture, token, tokens)
    forward = forward_half(objective.forward, statistics, mixture, top)

    a_r, a_f = times_or_zero(c_r, reverse.a), times_or_zero(c_f, forward.a)
    dense_r, dense_f = isinstance(objective.reverse, str | Skewed), isinstance(objective.forward, str | Skewed)
    b = c_r if dense_r else torch.zeros_like(c_r)
    c = c_f if dense_f else torch.zeros_like(c_f)
    own = None
    if not (dense_r and dense_f):
        common = (a_r if dense_r else 0.0) + (a_f if dense_f else torch.zeros_like(a_f))
        parts = [
            (columns, times_or_zero(weight.unsqueeze(1), half.own), times_or_zero(weight, half.a))
            for columns, weight, half in ((token, c_r, reverse), (top, c_f, forward))
            if columns is not None and half.own is not None
        ]
        ids, present, values = joined(parts)
        own = Own(ids, present, common, values)
    reverse_value = torch.where(c_r == 0, 0.0, reverse.value)
    forward_value = torch.where(c_f == 0, 0.0, forward.value)
    loss = times_or_zero(c_r, reverse_value) + times_or_zero(c_f, forward_value)
    return Terms(reverse_value, forward_value, loss, Coefficients(a_r + a_f, b, c), own)


def reverse_half(
    half: Any,
    statistics: RowStatistics,
    mixture: MixtureStatistics | None,
    token: Columns | None,
    tokens: Tokens,
) -> Half:
    """Returns the reverse half R of every row, with its gradient."""
    if isinstance(half, Sampled):
        assert token is not None
        return sampled(half, token, tokens)
    if half == "none":
        zero = torch.zeros_like(statistics.student_sum)
        return Half(zero, zero)
    if mixture is not None:
        return Half(mixture.reverse_kl, mixture.reverse_share - mixture.reverse_kl)
    return Half(statistics.reverse_kl, -statistics.reverse_kl)


def forward_half(half: Any, statistics: RowStatistics, mixture: MixtureStatistics | None, top: Columns | None) -> Half:
    """Returns the forward half F of every row, with its gradient."""
    if isinstance(half, TopK):
        assert top is not None
        return top_k_half(half, top)
    if half == "none":
        zero = torch.zeros_like(statistics.student_sum)
        return Half(zero, zero)
    if mixture is not None:
        return Half(mixture.forward_kl, mixture.forward_share)
    return Half(statistics.forward_kl, torch.ones_like(statistics.student_sum))


def sampled(half: Sampled, token: Columns, tokens: Tokens) -> Half:
    """Returns max(−A·r, −A·clip(r)) on the sampled token; where a clip decides, there is no gradient."""
    log_p, log_q, old_log_probs, advantage = (
        token.log_p[:, 0],
        token.log_q[:, 0],
        tokens.old_log_probs,
        tokens.advantages,
    )
    assert old_log_probs is not None
    if advantage is None:
        advantage = log_q - old_log_probs
    ratio = torch.exp(log_p - old_log_probs)
    clipped = ratio.clamp(1 - half.clip_low, 1 + half.clip_high)
    free, bound = -times_or_zero(ratio, advantage), -times_or_zero(clipped, advantage)
    pull = torch.where(free < bound, 0.0, -free)  # A·r where it is followed; NaN where it is
    value = torch.maximum(free, bound)
    if half.clip_most is not None:
        most = -half.clip_most * advantage
        beyond = (advantage < 0) & (value > most)
        value, pull = torch.where(beyond, most, value), torch.where(beyond, 0.0, pull)
    # −A·r·∂log p(y): p·(A·r) everywhere but at y, where it is (p(y) − 1)·A·r.
    return Half(value, pull, times_or_zero(pull.unsqueeze(1), torch.expm1(token.log_p)))


def top_k_half(half: TopK, top: Columns) -> Half:
    """Returns the forward KL over the columns present; the four variants of :class:`TopK` are one formula."""
    log_q = torch.where(top.present, top.log_q, -torch.inf)
    log_p = torch.where(top.present, top.log_p, -torch.inf)
    if half.teacher == "renormalized":
        log_q = log_q - total(log_q).unsqueeze(1)
    q = log_q.exp()
    mass = q.sum(1)
    a = mass
    if half.student == "renormalized":
        log_p = log_p - total(log_p).unsqueeze(1)
        a = torch.zeros_like(mass)
    p = log_p.exp()
    divergence = times_or_zero(q, log_q - log_p)
    if not half.tail:
        return Half(divergence.sum(1), a, mass.unsqueeze(1) * p - q)
    # What the student has outside is what the teacher has there, plus what the teacher has more inside: near the
    # teacher that keeps the digits of 1 − q_tail/p_tail. Below the smallest there is nothing to compare.
    own = p - q
    smallest = torch.finfo(q.dtype).eps
    q_tail = (1 - mass).clamp_min(smallest)
    p_tail = (q_tail - own.sum(1)).clamp_min(smallest)
    # Σ q·log(q/p) − q + p over the k + 1 classes: no term is below 0, and what is in sum is rounding.
    of_top = (divergence + own).sum(1)
    of_tail = times_or_zero(q_tail, torch.log(q_tail / p_tail)) - q_tail + p_tail
    return Half((of_top + of_tail).clamp_min(0), (p_tail - q_tail) / p_tail, own)


def total(log_mass: Tensor) -> Tensor:
    """Returns log Σ exp over the columns ``[n, k]``; 0 in a row that has none, where −inf would make NaN of it."""
    whole = torch.logsumexp(log_mass, 1)
    return torch.where(whole == -torch.inf, 0.0, whole)


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
