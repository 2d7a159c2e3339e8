"""Objective: what is minimised on each token, and the numbers that follow from it. No kernel is known here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..arguments import finite, one_of, quoted
from ..row_math.formulas import Combine
from .gates import EntropyGate, Gate, QuantileGate
from .halves import Sampled, Skewed, TopK

COMBINES = ("add", "switch", "blend")
Reverse = Literal["full", "sampled", "none"] | Sampled | TopK | Skewed
Forward = Literal["full", "top_k", "none"] | TopK | Skewed


@dataclass(frozen=True)
class Objective:
    """What is minimised on each token: L = c_r·R + c_f·F + λ·C (docs/math.md, "The loss of one token").

    Args:
        gate: g, when the forward half joins: an :class:`EntropyGate` (default: H_teacher > 0.8 nats, as in the paper),
            a :class:`QuantileGate`, ``"always"``, ``"never"``, or a callable from the :class:`RowStatistics` of all
            tokens of a call to one number each; a ``gate=`` tensor in the call replaces it.
        alpha: α ≥ 0, the weight of the forward half where the gate is open. Default 1.0, as in the paper.
        combine: ``"add"`` (default; the paper's Eq. 9): c_r = ρ, c_f = α·g, so that the reverse half stays on every
            token. ``"switch"``: c_r = ρ·(1 − g), c_f = α·g. ``"blend"``: c_r = ρ·(1 − α·g), c_f = α·g with α ≤ 1.
        temperature: T > 0, or one for the student and one for the teacher; distributions are softmax(z/T), and the
            entropies are theirs. Default 1.0.
        reverse: the reverse half R: ``"full"`` (default), ``"sampled"`` or a :class:`Sampled` (the paper's),
            a :class:`TopK`, a :class:`Skewed`, or ``"none"`` where the trainer brings a policy-gradient term of its
            own.
        forward: the forward half F: ``"full"`` (default), ``"top_k"`` or a :class:`TopK` (the paper's), a
            :class:`Skewed`, or ``"none"``.
        reverse_weight: ρ ≥ 0, the weight of the reverse half. Default 1.0.
        temperature_squared: multiply the loss by T², which keeps the size of its gradient when T changes (Hinton et
            al., arXiv 1503.02531). Default False. Needs one temperature for both sides.
        cross_entropy: λ ≥ 0, the weight of C = −log p(y), of the ``token_ids=`` of the call, or where these are not
            given, of its ``labels=``. Default 0. It stays on every token, whatever the gate is, and needs a student at
            temperature 1, which is where a model's cross-entropy is.

    Raises:
        TypeError, ValueError: an option is outside what is stated above.

    Example::

        objective = Objective(gate=EntropyGate(0.5), alpha=0.3)
        print(objective)  # its formula
        loss = entropy_aware_kl(torch.randn(3, 50), torch.randn(3, 50), objective=objective).loss
    """

    gate: Gate = field(default_factory=lambda: EntropyGate())  # a bare class there is not traced by torch.compile
    alpha: float = 1.0
    combine: Literal["add", "switch", "blend"] = "add"
    temperature: float | tuple[float, float] = 1.0
    reverse: Reverse = "full"
    forward: Forward = "full"
    reverse_weight: float = 1.0
    temperature_squared: bool = False
    cross_entropy: float = 0.0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not (isinstance(self.gate, EntropyGate | QuantileGate) or self.gate in ("always", "never")):
            if isinstance(self.gate, str) or not callable(self.gate):
                raise TypeError(
                    "Objective.gate must be an EntropyGate, a QuantileGate, 'always', 'never' or a callable, "
                    f"got {quoted(self.gate)}"
                )
        one_of("Objective.combine", self.combine, COMBINES)
        put("alpha", finite("Objective.alpha", self.alpha, least=0.0))
        if self.combine == "blend" and self.alpha > 1:
            raise ValueError(f"Objective.alpha must be at most 1 with combine='blend', got {self.alpha!r}")
        put("reverse_weight", finite("Objective.reverse_weight", self.reverse_weight, least=0.0))
        if isinstance(self.temperature, tuple | list):
            if len(self.temperature) != 2:
                raise ValueError(f"Objective.temperature must be a number or two, got {quoted(self.temperature)}")
            put("temperature", tuple(finite("Objective.temperature", t, above=0.0) for t in self.temperature))
        else:
            put("temperature", finite("Objective.temperature", self.temperature, above=0.0))
        one_of("Objective.temperature_squared", self.temperature_squared, (False, True))
        if self.temperature_squared and isinstance(self.temperature, tuple):
            raise ValueError(
                f"Objective.temperature_squared needs one temperature for both sides, got {self.temperature!r}"
            )
        put("cross_entropy", finite("Objective.cross_entropy", self.cross_entropy, least=0.0))
        if self.cross_entropy != 0 and self.temperatures[0] != 1:
            raise ValueError(
                "Objective.cross_entropy needs a student at temperature 1, whose log-probabilities a visit at another "
                f"temperature does not see, got temperature={self.temperature!r}: pass temperature=(1.0, T_teacher) or "
                "add torch.nn.functional.cross_entropy yourself"
            )
        if not isinstance(self.reverse, Sampled | TopK | Skewed):
            one_of("Objective.reverse", self.reverse, ("full", "sampled", "none"))
        if not isinstance(self.forward, TopK | Skewed):
            one_of("Objective.forward", self.forward, ("full", "top_k", "none"))
        if isinstance(self.reverse, TopK) and (self.reverse.teacher, self.reverse.student) == ("renormalized", "full"):
            raise ValueError(
                "Objective.reverse must be a TopK with teacher='raw' (and tail=True for a divergence), or with "
                f"student='renormalized', got {self.reverse!r}, which is below 0 where p = q"
            )
        put("reverse", Sampled() if self.reverse == "sampled" else self.reverse)
        put("forward", TopK() if self.forward == "top_k" else self.forward)
        if self.reverse == self.forward == "none":
            raise ValueError("Objective.reverse and Objective.forward are both 'none': nothing would be minimised")

    @classmethod
    def eopd(cls, temperature: float = 1.0) -> Objective:
        """Entropy-aware on-policy distillation (arXiv 2603.07079, Eq. 9) with both KLs over the whole vocabulary.

        An alias of the default, ``Objective()``.
        """
        return cls(temperature=temperature)

    @classmethod
    def eopd_paper(cls, temperature: float = 1.0) -> Objective:
        """Entropy-aware on-policy distillation as the paper's Alg. 1 trains it.

        The sampled, clipped reverse half and the teacher's top 16, renormalised; τ = 0.8, α = 1. Needs ``token_ids=``
        and ``old_log_probs=``.
        """
        return cls(reverse=Sampled(), forward=TopK(16), temperature=temperature)

    @classmethod
    def on_policy_distillation(cls, temperature: float = 1.0) -> Objective:
        """The sampled, clipped reverse half alone: on-policy distillation as policy gradient (the paper's baseline)."""
        return cls(reverse=Sampled(), forward="none", gate="never", temperature=temperature)

    @classmethod
    def reverse_kl(cls, temperature: float = 1.0) -> Objective:
        """Reverse KL on every token and nothing else: on-policy distillation as in GKD (arXiv 2306.13649), β = 1."""
        return cls(gate="never", forward="none", temperature=temperature)

    @classmethod
    def forward_kl(cls, temperature: float = 1.0) -> Objective:
        """Forward KL on every token and nothing else: classical distillation over the whole vocabulary."""
        return cls(gate="always", reverse="none", temperature=temperature)

    @classmethod
    def minillm_token(cls, temperature: float = 1.0) -> Objective:
        """The single-step part of MiniLLM's gradient (arXiv 2306.08543), an alias of :meth:`reverse_kl`."""
        return cls.reverse_kl(temperature)

    @classmethod
    def jsd(cls, beta: float = 0.5, temperature: float = 1.0) -> Objective:
        """Generalised Jensen–Shannon divergence β·KL(q ‖ m) + (1 − β)·KL(p ‖ m) with m = β·q + (1 − β)·p, 0 < β < 1
        (GKD, arXiv 2306.13649). For β → 0 it is β·forward KL, for β → 1 it is (1 − β)·reverse KL."""
        beta = finite("beta", beta, above=0.0, most=1.0)
        if beta == 1:
            raise ValueError("beta must be below 1 in a JSD; gkd(1.0) is the reverse KL")
        return cls(
            gate="always",
            reverse=Skewed(1 - beta),
            forward=Skewed(beta),
            reverse_weight=1 - beta,
            alpha=beta,
            temperature=temperature,
        )

    @classmethod
    def gkd(cls, beta: float = 0.5, temperature: float = 1.0) -> Objective:
        """GKD's family with its end points as GKD and trl define them: β = 0 the forward KL, β = 1 the reverse KL, and
        :meth:`jsd` between."""
        beta = finite("beta", beta, least=0.0, most=1.0)
        if beta == 0:
            return cls.forward_kl(temperature)
        return cls.reverse_kl(temperature) if beta == 1 else cls.jsd(beta, temperature)

    @classmethod
    def skewed_forward_kl(cls, skew: float = 0.1, temperature: float = 1.0) -> Objective:
        """DistiLLM's SKL (arXiv 2402.03898): KL(q ‖ skew·q + (1 − skew)·p)."""
        return cls(gate="always", reverse="none", forward=Skewed(skew), temperature=temperature)

    @classmethod
    def skewed_reverse_kl(cls, skew: float = 0.1, temperature: float = 1.0) -> Objective:
        """DistiLLM's SRKL (arXiv 2402.03898): KL(p ‖ skew·p + (1 − skew)·q)."""
        return cls(gate="never", forward="none", reverse=Skewed(skew), temperature=temperature)

    @classmethod
    def jeffreys(cls, temperature: float = 1.0) -> Objective:
        """The sum of both KLs on every token."""
        return cls(gate="always", temperature=temperature)

    @property
    def temperatures(self) -> tuple[float, float]:
        """T of the student and of the teacher."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature, self.temperature)

    @property
    def loss_factor(self) -> float:
        """What the loss of every token is multiplied by: T² or 1."""
        return self.temperatures[0] ** 2 if self.temperature_squared else 1.0

    @property
    def combination(self) -> Combine:
        """The halves' weights as functions of the gate, the factor T² included."""
        rho = 0.0 if self.reverse == "none" else self.reverse_weight * self.loss_factor
        alpha = 0.0 if self.forward == "none" else self.alpha * self.loss_factor
        r1 = {"add": 0.0, "switch": -rho, "blend": -self.alpha * rho}[self.combine]
        return Combine(rho, r1, 0.0, alpha)

    @property
    def skews(self) -> tuple[float, float] | None:
        """The skews of the forward and the reverse half, or None where neither is against a mixture."""
        halves = (self.forward, self.reverse)
        if not any(isinstance(half, Skewed) for half in halves):
            return None
        forward, reverse = (half.skew if isinstance(half, Skewed) else 0.0 for half in halves)
        return forward, reverse

    @property
    def top_k(self) -> dict[str, int]:
        """Of each side whose likeliest entries a half looks at, how many of them."""
        sizes: dict[str, int] = {}
        for half in (self.reverse, self.forward):
            if isinstance(half, TopK):
                sizes[half.of] = max(half.k, sizes.get(half.of, 0))
        return sizes

    @property
    def needs_token(self) -> bool:
        """Whether the loss looks at the sampled token."""
        return isinstance(self.reverse, Sampled) or self.cross_entropy != 0

    @property
    def hard_gate(self) -> bool:
        """Whether the gate is a threshold on the teacher's entropy, which the row kernels apply themselves."""
        if isinstance(self.gate, EntropyGate):
            return self.gate.of == "teacher" and self.gate.sharpness is None
        return self.gate in ("always", "never")

    def gate_threshold(self, vocab_size: int) -> float:
        """The entropy in nats above which a hard gate is open: ∓inf for ``"always"`` and ``"never"``."""
        if isinstance(self.gate, EntropyGate):
            return self.gate.threshold_in_nats(vocab_size)
        return -math.inf if self.gate == "always" else math.inf

    def __str__(self) -> str:
        """The formula: ``print(Objective())``."""
        gated = self.gate not in ("always", "never")
        terms, where = [], []
        if (coefficient := self._reverse_coefficient(gated)) is not None:
            terms.append(f"{coefficient}R")
            full = self.reverse.formula("p", "q") if isinstance(self.reverse, Skewed | TopK) else "KL(p ‖ q)"
            where.append(f"  R = {self.reverse.formula() if isinstance(self.reverse, Sampled) else full}")
        if self.forward != "none" and self.alpha != 0 and self.gate != "never":
            terms.append(f"{factor(self.alpha)}{'g·' if gated else ''}F")
            full = self.forward.formula("q", "p") if isinstance(self.forward, Skewed | TopK) else "KL(q ‖ p)"
            where.append(f"  F = {full}")
        if self.cross_entropy != 0:
            terms.append(f"{factor(self.cross_entropy)}C")
            where.append("  C = −log p(y)")
        total = " + ".join(terms) or "0"
        if gated and "g" in total:
            custom = getattr(self.gate, "__name__", type(self.gate).__name__) + "(statistics)"
            where.append(f"  g = {self.gate if isinstance(self.gate, EntropyGate | QuantileGate) else custom}")
        over = ["" if temperature == 1 else f" / {temperature:g}" for temperature in self.temperatures]
        where.append(f"  p = softmax(z_student{over[0]}), q = softmax(z_teacher{over[1]})")
        if self.loss_factor != 1:
            total = f"{self.loss_factor:g}·" + (f"({total})" if len(terms) > 1 else total)
        return "\n".join([f"L = {total}", *where])

    def _reverse_coefficient(self, gated: bool) -> str | None:
        """What stands before R in the formula; None where the half is nowhere."""
        if self.reverse == "none":
            return None
        opened = {"add": 1.0, "switch": 0.0, "blend": 1 - self.alpha}[self.combine]
        if gated and opened != 1:
            return f"{factor(self.reverse_weight)}(1 − {factor(1 - opened)}g)·"
        constant = self.reverse_weight * (opened if self.gate == "always" else 1.0)
        return None if constant == 0 else factor(constant)


def factor(x: float) -> str:
    """A number before a product, nothing where it is 1."""
    return "" if x == 1 else f"{x:g}·"
