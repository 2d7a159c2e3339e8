"""Loss and gradients in fp64, for each objective that a contender computes, and how far a result is from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .problems import LogitsProblem

# Tokens at a time: some ten fp64 tensors of so many rows are alive at once.
CHUNK = 32
# Rows of a head at a time: whole, one of 262,144 x 4,096 would take 8 GB in fp64.
HEAD_ROWS = 2**14


def gated(log_p: Tensor, log_q: Tensor) -> Tensor:
    entropy = -(log_q.exp() * log_q).sum(-1)
    return reverse(log_p, log_q) + (entropy > 0.8) * forward(log_p, log_q)


def reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (reverse(log_p, log_m) + reverse(log_q, log_m))


def soft_entropy_gate(log_p: Tensor, log_q: Tensor) -> Tensor:
    """orda-kernel's entropy_adaptive with its defaults: H_t / log V against 0.5, blended by a sigmoid of width 0.1."""
    entropy = -(log_q.exp() * log_q).sum(-1) / math.log(log_q.shape[-1])
    gate = torch.sigmoid((entropy - 0.5) / 0.1)
    return gate * forward(log_p, log_q) + (1 - gate) * reverse(log_p, log_q)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−Σ q log p: the forward KL without the teacher's entropy, and with the same gradient."""
    return -(log_q.exp() * log_p).sum(-1)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gated": gated,
    "reverse": reverse,
    "forward": forward,
    "jsd": jsd,
    "soft entropy gate": soft_entropy_gate,
    "soft cross-entropy": soft_cross_entropy,
}


@dataclass(frozen=True, eq=False)
class Truth:
    """The mean loss of a problem and the gradients of its leaves, in fp64."""

    loss: Tensor
    gradients: list[Tensor]


class Errors(NamedTuple):
    """Relative errors: |L − L'| / |L'| of the loss, ‖G − G'‖ / ‖G'‖ of dX (or of dlogits) and of dW."""

    loss: float
    student: float
    weight: float | None


def truth(problem: LogitsProblem, objective: str, *, of_head: bool = True) -> Truth:
    """Computes loss and gradients in fp64, a few tokens at a time; ``of_head``: that of the student's head too.

    Raises:
        KeyError: ``objective`` is none of :data:`OBJECTIVES`.
    """
    loss_of, tokens = OBJECTIVES[objective], len(problem.student)
    sides = {name: side.detach() for name, side in problem.sides.items()}
    for name in ("student", "student_weight") if of_head else ("student",):
        if name in sides:
            sides[name] = sides[name].double().requires_grad_()
    exact = type(problem)(**sides)
    student_weight, teacher_weight = (exact.sides.get(f"{side}_weight") for side in ("student", "teacher"))
    total = exact.student.new_zeros(())
    for rows in torch.arange(tokens, device=exact.student.device).split(CHUNK):
        log_p = log_softmax(logits(exact.student[rows], student_weight), -1)
        with torch.no_grad():
            log_q = log_softmax(logits(exact.teacher[rows].double(), teacher_weight), -1)
        loss = loss_of(log_p, log_q).sum() / tokens
        loss.backward()
        total += loss.detach()
    return Truth(total, [leaf.grad for leaf in exact.leaves if leaf.grad is not None])


def logits(side: Tensor, weight: Tensor | None) -> Tensor:
    """Returns logits in fp64; ``weight``: None where ``side`` holds logits already."""
    if weight is None:
        return side
    return torch.cat([side @ part.double().t() for part in weight.split(HEAD_ROWS)], -1)


def errors(loss: Tensor, gradients: list[Tensor], exact: Truth) -> Errors:
    """Compares a loss and its gradients with the truth."""
    of_loss = (loss.detach().double() - exact.loss).abs() / exact.loss.abs()
    of_gradients = [distance(value, true) for value, true in zip(gradients, exact.gradients, strict=True)]
    return Errors(float(of_loss), of_gradients[0], of_gradients[1] if len(of_gradients) > 1 else None)


def distance(value: Tensor, true: Tensor) -> float:
    """‖value − true‖ / ‖true‖, some rows at a time, so that a large dW is not copied whole to fp64."""
    squares = sum(
        float((a.double() - b).square().sum())
        for a, b in zip(value.split(HEAD_ROWS), true.to(value.device).split(HEAD_ROWS), strict=True)
    )
    return math.sqrt(squares) / float(true.norm())


def largest_error(value: Tensor, true: Tensor) -> float:
    """max |value − true| / max |true|; NaN counts as infinitely wrong."""
    error = (value.double() - true).abs().max() / true.abs().max()
    return float("inf") if error.isnan() else float(error)
