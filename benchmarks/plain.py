"""The naive peer: the loss as one writes it by hand in PyTorch, with the logits and everything after them in memory.

Its arithmetic is fp32 on fp32 logits, whatever the inputs; the products run in the dtype of hidden states and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def logits_loss(
    student: Tensor,  # [..., V]
    teacher: Tensor,  # [..., V]
    mask: Tensor | None = None,  # [...], bool
    *,
    threshold: float = 0.8,
    alpha: float = 1.0,
) -> Tensor:
    """reverse_kl + α·1[H_teacher > τ]·forward_kl of logits, the mean over the tokens of ``mask``."""
    log_p = log_softmax(student.float(), -1)
    with torch.no_grad():
        log_q = log_softmax(teacher.float(), -1)
    return gated_kl(log_p, log_q, mask, threshold, alpha)


def hidden_loss(
    student: Tensor,  # [..., D_s]
    teacher: Tensor,  # [..., D_t]
    student_weight: Tensor,  # [V, D_s]
    teacher_weight: Tensor,  # [V, D_t]
    mask: Tensor | None = None,  # [...], bool
    *,
    threshold: float = 0.8,
    alpha: float = 1.0,
) -> Tensor:
    """The same of hidden states under their heads."""
    log_p = log_softmax((student @ student_weight.t()).float(), -1)
    with torch.no_grad():
        log_q = log_softmax((teacher @ teacher_weight.t()).float(), -1)
    return gated_kl(log_p, log_q, mask, threshold, alpha)


def gated_kl(log_p: Tensor, log_q: Tensor, mask: Tensor | None, threshold: float, alpha: float) -> Tensor:
    """The loss of log-probabilities ``[..., V]``. Both KLs share one log-ratio, which keeps memory and time down."""
    with torch.no_grad():
        q = log_q.exp()
        gate = -(q * log_q).sum(-1) > threshold
    log_ratio = log_p - log_q
    reverse_kl = (log_p.exp() * log_ratio).sum(-1)
    forward_kl = -(q * log_ratio).sum(-1)
    losses = reverse_kl + alpha * gate * forward_kl
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / mask.sum().clamp(min=1)
