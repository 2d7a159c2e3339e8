"""Formulas of a block: transformed logits, the gate, the coefficients of a row and the gradient of a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mixture import Skews, mixture_terms
from .statistics import RowStatistics, times_or_zero


class Combine(NamedTuple):
    """The halves' weights by the gate g: c_r = reverse + reverse_gate·g and c_f = forward + forward_gate·g."""

    reverse: float
    reverse_gate: float
    forward: float
    forward_gate: float

    def __call__(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """(c_r, c_f) for gates ``[n]``."""
        return self.reverse + self.reverse_gate * gate, self.forward + self.forward_gate * gate


class Coefficients(NamedTuple):
    """A row's numbers in the one gradient form: ∂L/∂z_s[v] = p_v·(a + b·(log p_v − log q_v)) − c·q_v, each ``[n]``."""

    a: Tensor
    b: Tensor
    c: Tensor

    def take(self, rows: Any) -> Coefficients:
        """The coefficients of some rows: a slice or an index."""
        return Coefficients(*(k[rows] for k in self))


def unused(k: Coefficients) -> Tensor:
    """Whether the gradient of a row with these coefficients is exactly 0, whatever its logits hold."""
    return (k.a == 0) & (k.b == 0) & (k.c == 0)


def open_gate(statistics: RowStatistics, threshold: float) -> Tensor:
    """1[H_teacher > threshold] as numbers, ``[n]``; NaN where the entropy is, unless the threshold is infinite."""
    if math.isinf(threshold):
        return torch.full_like(statistics.teacher_sum, 1.0 if threshold < 0 else 0.0)
    return exceeds(statistics.teacher_entropy, threshold)


def gated_halves(statistics: RowStatistics, gate: Tensor, combine: Combine) -> tuple[Tensor, Tensor]:
    """R and F of two full halves in nats, ``[n]`` each; 0 where a half has no weight, which may be infinite there."""
    c_r, c_f = combine(gate)
    return statistics.reverse_kl.masked_fill(c_r == 0, 0.0), statistics.forward_kl.masked_fill(c_f == 0, 0.0)


def gated_loss(statistics: RowStatistics, gate: Tensor, combine: Combine) -> Tensor:
    """The loss c_r·R + c_f·F of two full halves in rows of weight 1, ``[n]``."""
    reverse, forward = gated_halves(statistics, gate, combine)
    c_r, c_f = combine(gate)
    return c_r * reverse + c_f * forward


def gated_coefficients(statistics: RowStatistics, gate: Tensor, combine: Combine, upstream: Tensor) -> Coefficients:
    """The coefficients of two full halves in rows whose loss is multiplied by ``upstream`` [n] (token weight × incoming
    gradient)."""
    c_r, c_f = combine(gate)
    used = upstream != 0
    a = torch.where(used, upstream * (c_f - times_or_zero(c_r, statistics.reverse_kl)), 0.0)
    return Coefficients(a, upstream * c_r, upstream * c_f)


def exceeds(entropy: Tensor, threshold: Tensor | float) -> Tensor:
    """1 where an entropy lies above the threshold, else 0, ``[n]``; NaN where it is NaN.

    A gate that a NaN shuts would take the row out of the loss, and what went wrong would go unseen.
    """
    return torch.where(entropy.isnan(), entropy, (entropy > threshold).to(entropy.dtype))


def transformed(logits: Tensor, transform: Sequence[float], dtype: torch.dtype) -> Tensor:
    """z = softcap·tanh(scale·x / softcap) / T in the compute dtype; without a softcap (0) z = scale·x / T."""
    scale, softcap, temperature = transform
    logits = logits.to(dtype)
    if softcap != 0:
        return torch.tanh(logits * (scale / softcap)) * (softcap / temperature)
    return logits if scale == temperature else logits * (scale / temperature)


def transform_slope(z: Tensor, transform: Sequence[float]) -> Tensor | float:
    """dz/dx, read off z itself: scale·(1 − tanh²) / T."""
    scale, softcap, temperature = transform
    if softcap != 0:
        return (1 - (z * (temperature / softcap)) ** 2) * (scale / temperature)
    return scale / temperature


def column_gradient(p: Tensor, q: Tensor, log_ratio: Tensor, coefficients: Coefficients) -> Tensor:
    """p·(a + b·(log p − log q)) − c·q."""
    a, b, c = coefficients
    return times_or_zero(p, a + times_or_zero(b, log_ratio)) - times_or_zero(c, q)


def mixture_column_gradient(
    p: Tensor, q: Tensor, log_ratio: Tensor, coefficients: Coefficients, skews: Skews
) -> Tensor:
    """p·(a + b·(λ_r − s_r)) − c·q·(1 − s_f)."""
    a, b, c = coefficients
    reverse = mixture_terms(log_ratio, skews.reverse)
    forward = mixture_terms(-log_ratio, skews.forward)
    of_student = times_or_zero(p, a + times_or_zero(b, reverse.log_over_mixture - reverse.own_share))
    return of_student - times_or_zero(c, times_or_zero(q, forward.other_share))
