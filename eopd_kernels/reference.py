"""The specification: the loss as docs/math.md writes it, in plain PyTorch, materialising everything.

Differentiable as often as one likes, exact to the inputs' precision (at least fp32; fp64 stays fp64), and as large as
N × V several times over. Every kernel is tested against it; nobody should train with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from .heads.lm_head import LMHead
from .inputs.check import checked
from .inputs.keywords import REFERENCE, ReferenceKeywords, shown_with, with_defaults
from .inputs.record import Call, Tokens
from .inputs.top_k_teacher import TopKTeacher
from .loss import EntropyAwareKLOutput
from .objective.gates import EntropyGate, QuantileGate
from .objective.halves import Sampled, Skewed, TopK
from .objective.objective import Objective
from .row_math.statistics import RowStatistics


@shown_with(REFERENCE)
def entropy_aware_kl(
    student: Tensor, teacher: Tensor | TopKTeacher | None, **keywords: Unpack[ReferenceKeywords]
) -> EntropyAwareKLOutput:
    """The same loss as :func:`eopd_kernels.entropy_aware_kl`, argument for argument, by the definitions."""
    given = with_defaults("eopd_kernels.reference.entropy_aware_kl", keywords, REFERENCE)
    call, reduction = checked(student, teacher, given), given["reduction"]
    objective = call.options.objective
    weights, tokens = call.weights, call.tokens  # [N]

    of_student, of_teacher = objective.temperatures
    z_t: Tensor | None = None
    log_q: Tensor | None = None
    z_s = transformed_logits(call.student, call.student_head, call.options.local_vocab_size, of_student).to(
        weights.dtype
    )
    log_p = torch.log_softmax(z_s, -1)  # [N, V]
    student_entropy = -expectation(log_p, log_p)
    if call.teacher is not None:
        z_t = transformed_logits(call.teacher, call.teacher_head, call.options.local_vocab_size, of_teacher).to(
            weights.dtype
        )
        log_q = torch.log_softmax(z_t, -1)
        teacher_entropy = -expectation(log_q, log_q)
        forward_kl = expectation(log_q, log_q - log_p)
        reverse_kl = expectation(log_p, log_p - log_q)
    else:
        assert tokens.teacher_entropy is not None
        teacher_entropy = tokens.teacher_entropy
        forward_kl = reverse_kl = torch.full_like(teacher_entropy, torch.nan)

    token = () if tokens.token_ids is None else token_log_probs(tokens, log_p, log_q)
    g = gate_of(call, z_s, z_t, teacher_entropy, student_entropy, token)
    c_r = {"add": torch.ones_like(g), "switch": 1 - g, "blend": 1 - objective.alpha * g}[objective.combine]
    c_r = c_r * objective.reverse_weight * (0.0 if objective.reverse == "none" else 1.0)
    c_f = objective.alpha * g * (0.0 if objective.forward == "none" else 1.0)
    c_r = c_r if tokens.reverse_weights is None else c_r * tokens.reverse_weights
    c_f = c_f if tokens.forward_weights is None else c_f * tokens.forward_weights
    factor = of_student**2 if objective.temperature_squared else 1.0
    reverse = reverse_half(objective, call, log_p, log_q, reverse_kl)
    forward = forward_half(objective, call, log_p, log_q, forward_kl)
    losses = times_or_zero(weights * factor, times_or_zero(c_r, reverse) + times_or_zero(c_f, forward))
    if objective.cross_entropy != 0:
        of_label, _ = token_log_probs(tokens, log_p, log_q)
        losses = losses + times_or_zero(weights * objective.cross_entropy, -of_label)

    loss = losses.view(call.leading) if reduction == "none" else losses.sum()
    if call.denominator is not None:
        loss = loss / call.denominator
    halves = torch.where(c_r == 0, 0.0, reverse), torch.where(c_f == 0, 0.0, forward)
    figures = (teacher_entropy, student_entropy, forward_kl, reverse_kl, g, *halves)
    of_token = torch.stack(token, 1).detach() if token else None
    seen = Figures(*[figure.detach() for figure in figures], of_token)  # type: ignore[call-arg]
    lower_bound = isinstance(teacher, TopKTeacher) and teacher.entropy is None
    return EntropyAwareKLOutput(loss, lower_bound, seen, weights != 0, call.leading)


@dataclass(eq=False)
class Figures:
    """The figures of N tokens, ``[N]`` each."""

    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    gate: Tensor
    reverse: Tensor
    forward: Tensor
    token_log_probs: Tensor | None  # [N, 2]


def transformed_logits(side: Tensor, head: LMHead | None, vocab_size: int, temperature: float) -> Tensor:
    """z = softcap·tanh(scale·x / softcap) / T of a side's first ``vocab_size`` logits x, ``[N, V]``, ≥ fp32."""
    full = torch.promote_types(side.dtype, torch.float32)
    side = side.reshape(-1, side.shape[-1])
    if head is None:
        return side.to(full)[:, :vocab_size] / temperature
    full = torch.promote_types(full, head.weight.dtype)
    logits = side.to(full) @ head.weight[:vocab_size].to(full).t()
    if head.bias is not None:
        logits = logits + head.bias[:vocab_size]
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


def token_log_probs(tokens: Tokens, log_p: Tensor, log_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns log p(y) and log q(y) of every token, ``[N]``."""
    assert tokens.token_ids is not None
    y, of_teacher = tokens.token_ids.unsqueeze(1), tokens.teacher_token_log_probs
    if of_teacher is None:
        assert log_q is not None
        of_teacher = log_q.gather(1, y).squeeze(1)
    return log_p.gather(1, y).squeeze(1), of_teacher


def reverse_half(objective: Objective, call: Call, log_p: Tensor, log_q: Tensor | None, reverse_kl: Tensor) -> Tensor:
    """Returns R of every token, ``[N]``."""
    half, tokens = objective.reverse, call.tokens
    if isinstance(half, Sampled):
        assert tokens.old_log_probs is not None
        of_student, of_teacher = token_log_probs(tokens, log_p, log_q)
        advantage = of_teacher - tokens.old_log_probs if tokens.advantages is None else tokens.advantages
        ratio = torch.exp(of_student - tokens.old_log_probs)
        clipped = ratio.clamp(1 - half.clip_low, 1 + half.clip_high)
        value = torch.maximum(-advantage * ratio, -advantage * clipped)
        if half.clip_most is not None:
            value = torch.where(advantage < 0, torch.minimum(value, -half.clip_most * advantage), value)
        return value
    if isinstance(half, TopK):
        own, other, (outside, of_other) = over_top(half, tokens, log_p, log_q)
        return expectation(own, own - other) + (outside * (outside.log() - of_other.log()) if half.tail else 0.0)
    if isinstance(half, Skewed):
        assert log_q is not None
        return expectation(log_p, log_p - log_mixture(half.skew, log_p, log_q))
    return reverse_kl


def forward_half(objective: Objective, call: Call, log_p: Tensor, log_q: Tensor | None, forward_kl: Tensor) -> Tensor:
    """Returns F of every token, ``[N]``."""
    half, tokens = objective.forward, call.tokens
    if isinstance(half, Skewed):
        assert log_q is not None
        return expectation(log_q, log_q - log_mixture(half.skew, log_q, log_p))
    if not isinstance(half, TopK):
        return forward_kl
    other, own, (of_other, outside) = over_top(half, tokens, log_p, log_q)
    return expectation(own, own - other) + (outside * (outside.log() - of_other.log()) if half.tail else 0.0)


def over_top(
    half: TopK, tokens: Tokens, log_p: Tensor, log_q: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns log p and log q over S as ``half`` has them, ``[N, k]``, and both masses outside of S, ``[N]``."""
    if tokens.top_ids is not None:
        assert tokens.top_log_probs is not None
        of_teacher, ids = tokens.top_log_probs, tokens.top_ids
        inside = of_teacher > -torch.inf
    else:
        assert log_q is not None
        ranked, ids = (log_q if half.of == "teacher" else log_p.detach()).topk(half.k, dim=1)
        of_teacher, inside = log_q.gather(1, ids), ranked > -torch.inf
    sides = [torch.where(inside, side, -torch.inf) for side in (log_p.gather(1, ids), of_teacher)]
    floor = torch.finfo(log_p.dtype).eps
    outside_p, outside_q = ((1 - side.exp().sum(1)).clamp_min(floor) for side in sides)
    wholes = [torch.where((side > -torch.inf).any(1), torch.logsumexp(side, 1), 0.0).unsqueeze(1) for side in sides]
    student = sides[0] - wholes[0] if half.student == "renormalized" else sides[0]
    teacher = sides[1] - wholes[1] if half.teacher == "renormalized" else sides[1]
    return student, teacher, (outside_p, outside_q)


def log_mixture(skew: float, log_own: Tensor, log_other: Tensor) -> Tensor:
    """Returns log(skew·own + (1 − skew)·other)."""
    if skew == 0:
        return log_other
    nowhere = (log_own == -torch.inf) & (log_other == -torch.inf)  # where logaddexp has a gradient of NaN
    own, other = log_own.masked_fill(nowhere, 0.0), log_other.masked_fill(nowhere, 0.0)
    return torch.logaddexp(math.log(skew) + own, math.log1p(-skew) + other).masked_fill(nowhere, -torch.inf)


def expectation(log_mass: Tensor, value: Tensor) -> Tensor:
    """Returns Σ_v mass·value over the vocabulary, where a column without mass contributes 0 whatever its value."""
    massless = log_mass == -torch.inf
    return (log_mass.exp() * value.masked_fill(massless, 0.0)).sum(-1)


def times_or_zero(weight: Tensor, value: Tensor) -> Tensor:
    """Returns weight·value, and 0 with a zero gradient where the weight is 0, whatever the value."""
    return weight * value.masked_fill(weight == 0, 0.0)


def gate_of(
    call: Call,
    z_s: Tensor,
    z_t: Tensor | None,
    teacher_entropy: Tensor,
    student_entropy: Tensor,
    token: tuple[Tensor, ...],
) -> Tensor:
    """Returns g of every token, ``[N]``; it has no gradient, and is 0 where the weight is."""
    gate, valid = call.options.objective.gate, call.weights != 0
    of = getattr(gate, "of", "teacher")
    entropy = (teacher_entropy if of == "teacher" else student_entropy).detach()
    if call.tokens.gate is not None:
        opened = call.tokens.gate
    elif isinstance(gate, EntropyGate):
        h = entropy / math.log(z_s.shape[1]) if gate.normalized else entropy
        above = h - gate.threshold
        hard = torch.where(above.isnan(), above, (above > 0).to(h.dtype))
        opened = hard if gate.sharpness is None else torch.sigmoid(gate.sharpness * above)
    elif isinstance(gate, QuantileGate):
        threshold = entropy[valid].nanquantile(gate.quantile) if valid.any() else torch.inf
        opened = torch.where(entropy.isnan(), entropy, (entropy > threshold).to(entropy.dtype))
    elif isinstance(gate, str):
        opened = torch.full_like(entropy, 1.0 if gate == "always" else 0.0)
    else:
        assert z_t is not None
        packed = RowStatistics.of(z_s.detach(), z_t.detach()).packed
        statistics = RowStatistics(packed, torch.stack(token, 1).detach() if token else None)
        opened = gate(statistics.unknown_where(~valid)).to(entropy.dtype)
    return torch.where(valid, opened, 0.0)
