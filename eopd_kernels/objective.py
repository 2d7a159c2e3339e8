"""Objective and EntropyGate: from the numbers of a row to its coefficients. No kernel is known here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .statistics import RowStatistics, weighted

COMBINES = ("add", "switch")


def finite(name: str, value: float, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """``value`` as a float, or a TypeError/ValueError that names the argument, what came and what is allowed."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or value <= above or value < least:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class EntropyGate:
    """The hard gate g = 1[H_teacher > threshold] of arXiv 2603.07079, Eq. 9.

    Args:
        threshold: τ in nats, finite. Default 0.8, the paper's.

    Raises:
        TypeError, ValueError: ``threshold`` is not a finite number.
    """

    threshold: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", finite("EntropyGate.threshold", self.threshold))


class Combine(NamedTuple):
    """The halves' weights as functions of the gate: c_r = r0 + r1·g and c_f = f0 + f1·g."""

    r0: float
    r1: float
    f0: float
    f1: float

    def __call__(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """(c_r, c_f) for gates ``[n]``."""
        return self.r0 + self.r1 * gate, self.f0 + self.f1 * gate


@dataclass(frozen=True)
class Objective:
    """What is minimised on each token: L = c_r·reverse_kl + c_f·forward_kl (docs/math.md, "The loss of one token").

    Args:
        gate: when the forward KL joins: an :class:`EntropyGate` (default: H_teacher > 0.8 nats, as in the paper),
            ``"always"`` or ``"never"``.
        alpha: α ≥ 0, the weight of the forward KL where the gate is open. Default 1.0, as in the paper.
        combine: ``"add"`` (default; the paper's Eq. 9): c_r = 1, c_f = α·g, so that reverse KL stays on every token.
            ``"switch"``: c_r = 1 − g, c_f = α·g.
        temperature: T > 0; both distributions are softmax(z/T), and the entropy is that of the tempered teacher.
            Default 1.0. No T² factor is applied.

    Raises:
        TypeError, ValueError: an option is outside what is stated above.
    """

    gate: EntropyGate | Literal["always", "never"] = field(default_factory=EntropyGate)
    alpha: float = 1.0
    combine: Literal["add", "switch"] = "add"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.gate, EntropyGate) and self.gate not in ("always", "never"):
            raise TypeError(f"Objective.gate must be an EntropyGate, 'always' or 'never', got {self.gate!r}")
        if self.combine not in COMBINES:
            raise ValueError(f"Objective.combine must be one of {COMBINES}, got {self.combine!r}")
        object.__setattr__(self, "alpha", finite("Objective.alpha", self.alpha, least=0.0))
        object.__setattr__(self, "temperature", finite("Objective.temperature", self.temperature, above=0.0))

    @classmethod
    def reverse_kl(cls, temperature: float = 1.0) -> Objective:
        """Reverse KL on every token and nothing else: on-policy distillation as in GKD (arXiv 2306.13649), β = 1."""
        return cls(gate="never", temperature=temperature)

    @classmethod
    def forward_kl(cls, temperature: float = 1.0) -> Objective:
        """Forward KL on every token and nothing else: classical distillation over the whole vocabulary."""
        return cls(gate="always", combine="switch", temperature=temperature)

    @property
    def gate_threshold(self) -> float:
        """The entropy in nats above which the gate is open: ∓inf for ``"always"`` and ``"never"``."""
        if isinstance(self.gate, EntropyGate):
            return self.gate.threshold
        return -math.inf if self.gate == "always" else math.inf

    @property
    def combination(self) -> Combine:
        """The halves' weights as functions of the gate."""
        if self.combine == "add":
            return Combine(1.0, 0.0, 0.0, self.alpha)
        return Combine(1.0, -1.0, 0.0, self.alpha)


def open_gate(statistics: RowStatistics, threshold: float) -> Tensor:
    """1[H_teacher > threshold] as numbers, ``[n]``."""
    return (statistics.teacher_entropy > threshold).to(statistics.packed.dtype)


def token_loss(statistics: RowStatistics, gate: Tensor, combine: Combine) -> Tensor:
    """c_r·R + c_f·F in nats, ``[n]``. A half whose weight is 0 is left out, even where its KL is infinite."""
    c_r, c_f = combine(gate)
    return weighted(c_r, statistics.reverse_kl) + weighted(c_f, statistics.forward_kl)


class Coefficients(NamedTuple):
    """A row's numbers in the one gradient form ∂L/∂z_s[v] = p_v·(a + b·(log p_v − log q_v)) − c·q_v, each ``[n]``."""

    a: Tensor
    b: Tensor
    c: Tensor


def gradient_coefficients(statistics: RowStatistics, gate: Tensor, combine: Combine, upstream: Tensor) -> Coefficients:
    """The coefficients of rows whose loss is multiplied by ``upstream`` [n] (token weight × incoming gradient)."""
    c_r, c_f = combine(gate)
    used = upstream != 0
    a = torch.where(used, upstream * (c_f - weighted(c_r, statistics.reverse_kl)), 0.0)
    return Coefficients(a, upstream * c_r, upstream * c_f)
