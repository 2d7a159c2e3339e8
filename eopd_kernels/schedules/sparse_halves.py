"""Halves that look at a few columns of a row: their values, and their gradients at those columns and elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs.record import Tokens
from ..objective.halves import Sampled, TopK
from ..row_math.statistics import times_or_zero


class Columns(NamedTuple):
    """A few columns of each row: which, whether they count, and the log-probabilities there."""

    ids: Tensor  # [n, k]
    present: Tensor  # [n, k] bool
    log_p: Tensor  # [n, k] log-probabilities of the student
    log_q: Tensor  # [n, k] of the teacher


class Half(NamedTuple):
    """One half of the loss in n rows: its value and its share of the gradient, for a weight of 1."""

    value: Tensor  # [n]
    a: Tensor  # [n]: its p·a, outside its own columns where it is sparse
    own: Tensor | None = None  # [n, k] at its own columns, instead of p·a


def cross_entropy(token: Columns) -> Half:
    """Returns −log p(y): its gradient is p everywhere but at y, where it is p(y) − 1."""
    log_p = torch.where(token.present, token.log_p, 0.0)
    return Half(-log_p[:, 0], torch.ones_like(log_p[:, 0]), torch.expm1(log_p))


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


def top_k_forward(half: TopK, top: Columns) -> Half:
    """Returns the forward KL over the columns present; the variants of :class:`TopK` are one formula."""
    log_p, log_q = over_top(half, top)
    p, q = log_p.exp(), log_q.exp()
    mass = q.sum(1)
    divergence, own = times_or_zero(q, log_q - log_p), p - q
    if not half.tail:
        a = mass if half.student == "full" else torch.zeros_like(mass)
        return Half(divergence.sum(1), a, mass.unsqueeze(1) * p - q)
    p_tail, q_tail, more = tails(mass, own)
    # Σ q·log(q/p) − q + p over the k + 1 classes: no term is below 0, and what is in sum is rounding.
    value = ((divergence + own).sum(1) + q_tail * torch.log(q_tail / p_tail) + more).clamp_min(0)
    whole = mass.clamp_min(1)  # 1, but for entries that a server has rounded
    return Half(value, (whole * p_tail - q_tail) / p_tail, whole.unsqueeze(1) * p - q)


def top_k_reverse(half: TopK, top: Columns) -> Half:
    """Returns the reverse KL over the columns present; the variants of :class:`TopK` are one formula."""
    log_p, log_q = over_top(half, top)
    p, q = log_p.exp(), log_q.exp()
    log_ratio = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    divergence = times_or_zero(p, log_ratio)
    if half.tail:
        difference = p - q
        p_tail, q_tail, more = tails(q.sum(1), difference)
        of_tail = torch.log(p_tail / q_tail)
        # As in the forward half: Σ p·log(p/q) − p + q over the k + 1 classes.
        value = ((divergence - difference).sum(1) + p_tail * of_tail - more).clamp_min(0)
        return Half(value, of_tail - value, times_or_zero(p, log_ratio - value.unsqueeze(1)))
    value = divergence.sum(1)
    # ∂/∂z of p·log(p/q) brings log(p/q) + 1; what it brings through the sum behind p is p·(R + p(S)) in every column.
    through = value + (p.sum(1) if half.student == "full" else 1.0)
    own = times_or_zero(p, log_ratio + 1 - through.unsqueeze(1))
    return Half(value, -through if half.student == "full" else torch.zeros_like(value), own)


def over_top(half: TopK, top: Columns) -> tuple[Tensor, Tensor]:
    """Returns log p and log q of the columns present, else −inf, over the vocabulary or over S as ``half`` says."""
    log_p = torch.where(top.present, top.log_p, -torch.inf)
    log_q = torch.where(top.present, top.log_q, -torch.inf)
    if half.teacher == "renormalized":
        log_q = log_q - total(log_q).unsqueeze(1)
    if half.student == "renormalized":
        log_p = log_p - total(log_p).unsqueeze(1)
    return log_p, log_q


def tails(mass: Tensor, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both sides' mass outside of S, and the student's less the teacher's, from the teacher's ``[n]`` inside
    and p − q ``[n, k]`` there.

    What the student has outside is what the teacher has there, plus what the teacher has more inside: near the teacher
    that keeps the digits of 1 − q_tail/p_tail. Below the smallest there is nothing to compare; entries that a server
    has rounded may have more than 1 in all.
    """
    smallest, more_inside = torch.finfo(mass.dtype).eps, difference.sum(1)
    p_tail, q_tail = (tail.clamp_min(smallest) for tail in (1 - mass - more_inside, 1 - mass))
    return p_tail, q_tail, torch.where(1 - mass < smallest, -more_inside, p_tail - q_tail)


def total(log_mass: Tensor) -> Tensor:
    """Returns log Σ exp over the columns ``[n, k]``; 0 in a row that has none, where −inf would make NaN of it."""
    whole = torch.logsumexp(log_mass, 1)
    return torch.where(whole == -torch.inf, 0.0, whole)
