"""The loss as one writes it by hand in PyTorch, with the logits and everything after them in memory.

Its arithmetic is fp32 on fp32 logits, whatever the inputs; the products run in the dtype of hidden states and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

THRESHOLD = 0.8


def loss(
    student: Tensor,  # [N, V] logits, or [N, D] hidden states
    teacher: Tensor,
    student_weight: Tensor | None = None,  # [V, D]
    teacher_weight: Tensor | None = None,
) -> Tensor:
    """reverse_kl + 1[H_teacher > τ]·forward_kl, the mean over tokens. Both KLs share one log-ratio to save memory."""
    log_p = log_softmax(logits(student, student_weight).float(), -1)
    with torch.no_grad():
        log_q = log_softmax(logits(teacher, teacher_weight).float(), -1)
        q = log_q.exp()
        gate = -(q * log_q).sum(-1) > THRESHOLD
    log_ratio = log_p - log_q
    reverse_kl = (log_p.exp() * log_ratio).sum(-1)
    forward_kl = -(q * log_ratio).sum(-1)
    return (reverse_kl + gate * forward_kl).mean()


def logits(side: Tensor, weight: Tensor | None) -> Tensor:
    return side if weight is None else side @ weight.t()
