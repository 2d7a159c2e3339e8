"""dX in fp64 of the first few tokens, for each divergence that a contender computes; it depends on no other token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..problems import HiddenProblem

TOKENS = 32


def gated(log_p: Tensor, log_q: Tensor) -> Tensor:
    entropy = -(log_q.exp() * log_q).sum(-1)
    return reverse(log_p, log_q) + (entropy > 0.8) * forward(log_p, log_q)


def reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return 0.5 * (reverse(log_p, log_m) + reverse(log_q, log_m))


TRUTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gated": gated,
    "reverse": reverse,
    "forward": forward,
    "jsd": jsd,
}


def grad_hidden(problem: HiddenProblem, divergence: str) -> Tensor | None:
    """The gradient of the mean with respect to the first tokens' hidden states, or None for a divergence not known."""
    if divergence not in TRUTHS:
        return None
    n = min(TOKENS, len(problem.student))
    student = problem.student[:n].detach().double().requires_grad_()
    log_p = log_softmax(product(student, problem.student_weight.detach()), -1)
    with torch.no_grad():
        log_q = log_softmax(product(problem.teacher[:n].double(), problem.teacher_weight), -1)
    TRUTHS[divergence](log_p, log_q).sum().div(len(problem.student)).backward()
    assert student.grad is not None
    return student.grad


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in fp64, a few rows of the head at a time: a whole one would take 8 GB."""
    return torch.cat([hidden @ part.double().t() for part in weight.split(2**14)], -1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value − truth| over the largest |truth|."""
    error = (value[: len(truth)].double() - truth).abs().max() / truth.abs().max()
    return float("inf") if error.isnan() else float(error)
