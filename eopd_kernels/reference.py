"""The specification: the loss as docs/math.md writes it, in plain PyTorch, materialising everything.

Differentiable as often as one likes, exact to the inputs' precision (at least fp32; fp64 stays fp64), and as large as
N × V several times over. Every kernel is tested against it; nobody should train with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import LMHead
from .inputs import checked
from .loss import EntropyAwareKLOutput
from .objective import EntropyGate, Objective


def entropy_aware_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    student_head: LMHead | None = None,
    teacher_head: LMHead | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    objective: Objective | None = None,
    reduction: str = "mean",
) -> EntropyAwareKLOutput:
    """The same loss as :func:`eopd_kernels.entropy_aware_kl`, argument for argument, by the definitions."""
    call = checked(
        student,
        teacher,
        student_head=student_head,
        teacher_head=teacher_head,
        mask=mask,
        labels=labels,
        ignore_index=ignore_index,
        num_items=num_items,
        vocab_size=vocab_size,
        objective=objective,
        reduction=reduction,
    )
    objective = call.options.objective
    weights = call.weights.view(call.leading)

    z_s = transformed_logits(student, student_head, call.options.vocab_size, objective.temperature)
    z_t = transformed_logits(teacher, teacher_head, call.options.vocab_size, objective.temperature)
    dtype = weights.dtype
    log_p = torch.log_softmax(z_s.to(dtype), -1)
    log_q = torch.log_softmax(z_t.to(dtype), -1)
    teacher_entropy = -expectation(log_q, log_q)
    student_entropy = -expectation(log_p, log_p)
    forward_kl = expectation(log_q, log_q - log_p)
    reverse_kl = expectation(log_p, log_p - log_q)

    gate = open_gate(objective, teacher_entropy)
    if objective.combine == "add":
        c_r, c_f = torch.ones_like(gate), objective.alpha * gate
    else:
        c_r, c_f = 1 - gate, objective.alpha * gate
    losses = times(weights, times(c_r, reverse_kl) + times(c_f, forward_kl))

    loss = losses if reduction == "none" else losses.sum()
    if call.denominator is not None:
        loss = loss / call.denominator
    figures = (teacher_entropy, student_entropy, forward_kl, reverse_kl, gate)
    return EntropyAwareKLOutput(loss, *(torch.where(weights == 0, 0.0, f).detach() for f in figures))


def transformed_logits(side: Tensor, head: LMHead | None, vocab_size: int, temperature: float) -> Tensor:
    """z = softcap·tanh(scale·x / softcap) / T of a side's first ``vocab_size`` logits x, ``[..., V]``, ≥ fp32."""
    full = torch.promote_types(side.dtype, torch.float32)
    if head is None:
        return side.to(full)[..., :vocab_size] / temperature
    full = torch.promote_types(full, head.weight.dtype)
    logits = side.to(full) @ head.weight[:vocab_size].to(full).t()
    if head.bias is not None:
        logits = logits + head.bias[:vocab_size]
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


def expectation(log_mass: Tensor, value: Tensor) -> Tensor:
    """Σ_v mass·value over the vocabulary, where a column without mass contributes 0 whatever its value."""
    massless = log_mass == -torch.inf
    return (log_mass.exp() * value.masked_fill(massless, 0.0)).sum(-1)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, and 0 with a zero gradient where the weight is 0, whatever the value."""
    return weight * value.masked_fill(weight == 0, 0.0)


def open_gate(objective: Objective, teacher_entropy: Tensor) -> Tensor:
    """g = 1[H_teacher > τ]; it has no gradient."""
    if isinstance(objective.gate, EntropyGate):
        return (teacher_entropy > objective.gate.threshold).to(teacher_entropy.dtype).detach()
    return torch.full_like(teacher_entropy, 1.0 if objective.gate == "always" else 0.0)
