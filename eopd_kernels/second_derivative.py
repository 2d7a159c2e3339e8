"""Second derivatives are refused, whoever asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # of the student, its weight and its bias


class FirstDerivative(torch.autograd.Function):
    """Hands gradients through and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError(
            "EntropyAwareKL has no second derivative: its gradient is computed by kernels that are not differentiable. "
            "For a double backward use eopd_kernels.reference.entropy_aware_kl"
        )


def refuse_second_derivative(gradients: Gradients, upstream: Tensor, anchor: Tensor) -> Gradients:
    """The gradients with a graph that raises, so that a double backward is never silently zero.

    The graph has to lead somewhere: autograd.grad() runs only what lies between the gradients and the tensors that it
    is asked about. Those are what the gradients depend on: the incoming gradient, and the inputs of the loss, to which
    the ``anchor``, an empty output of the loss, leads without keeping them alive.
    """
    refusing = iter(FirstDerivative.apply(upstream, anchor, *(g for g in gradients if g is not None)))
    return tuple(None if g is None else next(refusing) for g in gradients)
