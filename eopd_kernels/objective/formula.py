"""An Objective as a formula, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gates import EntropyGate, QuantileGate
from .halves import Sampled, Skewed, TopK

if TYPE_CHECKING:
    from .objective import Objective


def formula(objective: Objective) -> str:
    """``L = …`` on the first line, what its letters stand for on the others."""
    gated = objective.gate not in ("always", "never")
    reverse = half_term(reverse_coefficient(objective, gated), "R", objective.reverse)
    forward = half_term(forward_coefficient(objective, gated), "F", objective.forward)
    total = " + ".join(term for term in (reverse, forward) if term) or "0"
    factor = objective.loss_factor
    inner = f"({total})" if " + " in total else total
    lines = [f"L = {total}" if factor == 1 else f"L = {factor:g}·{inner}"]
    if reverse:
        lines.append(f"  R = {reverse_formula(objective.reverse)}")
    if forward:
        lines.append(f"  F = {forward_formula(objective.forward)}")
    if gated and "g" in reverse + forward:
        lines.append(f"  g = {gate_formula(objective)}")
    student, teacher = objective.temperatures
    lines.append(f"  p = softmax(z_student{over(student)}), q = softmax(z_teacher{over(teacher)})")
    return "\n".join(lines)


def reverse_coefficient(objective: Objective, gated: bool) -> str | None:
    """c_r, or None where the half is nowhere."""
    rho, alpha = objective.reverse_weight, objective.alpha
    if objective.reverse == "none":
        return None
    shut = {"add": 1.0, "switch": 1.0, "blend": 1.0}[objective.combine]
    opened = {"add": 1.0, "switch": 0.0, "blend": 1 - alpha}[objective.combine]
    if not gated or opened == 1:
        constant = rho * (opened if objective.gate == "always" else shut)
        return None if constant == 0 else number(constant)
    return f"{number(rho)}(1 − {number(1 - opened)}g)·"


def forward_coefficient(objective: Objective, gated: bool) -> str | None:
    """c_f, likewise."""
    if objective.forward == "none" or objective.alpha == 0 or objective.gate == "never":
        return None
    return number(objective.alpha) + ("g·" if gated else "")


def half_term(coefficient: str | None, name: str, half: object) -> str:
    return "" if coefficient is None else f"{coefficient}{name}"


def number(x: float) -> str:
    """A factor, nothing where it is 1."""
    return "" if x == 1 else f"{x:g}·"


def over(temperature: float) -> str:
    return "" if temperature == 1 else f" / {temperature:g}"


def reverse_formula(half: object) -> str:
    if isinstance(half, Sampled):
        return (
            f"max(−A·r, −A·clip(r, {1 - half.clip_low:g}, {1 + half.clip_high:g})), "
            "r = p(y)/p_old(y), A = log q(y) − log p_old(y)"
        )
    if isinstance(half, Skewed):
        return f"KL(p ‖ {half.skew:g}·p + {1 - half.skew:g}·q)"
    return "KL(p ‖ q)"


def forward_formula(half: object) -> str:
    if isinstance(half, Skewed):
        return f"KL(q ‖ {half.skew:g}·q + {1 - half.skew:g}·p)"
    if not isinstance(half, TopK):
        return "KL(q ‖ p)"
    q = "q" if half.teacher == "raw" else "q̃"
    p = "p" if half.student == "full" else "p̃"
    text = f"Σ_S {q}·log({q}/{p})"
    if half.tail:
        text += " + (1 − q(S))·log((1 − q(S))/(1 − p(S)))"
    text += f", S = the teacher's {half.k} likeliest"
    renormalised = [name for name, letter in (("q̃ = q/q(S)", q), ("p̃ = p/p(S)", p)) if len(letter) > 1]
    return ", ".join([text, *renormalised])


def gate_formula(objective: Objective) -> str:
    gate = objective.gate
    if isinstance(gate, EntropyGate | QuantileGate):
        return str(gate)
    return f"{getattr(gate, '__name__', type(gate).__name__)}(statistics)"
