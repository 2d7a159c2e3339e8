"""There are first derivatives only: whoever asks for another, in whichever of torch's ways, is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional

from eopd_kernels import LMHead, entropy_aware_kl

GENERATOR = torch.Generator().manual_seed(0)
Z, T, DIRECTION = (torch.randn(2, 9, generator=GENERATOR) for _ in range(3))
HIDDEN, WEIGHT = torch.randn(2, 4, generator=GENERATOR), torch.randn(9, 4, generator=GENERATOR)
REFUSED = "EntropyAwareKL has no second derivative"


def penalised(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a loss with a gradient penalty, by autograd.grad: it runs no graph but that towards z."""
    z = Z.clone().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    return torch.autograd.grad(value + gradient.square().sum(), z)[0]


def dual(loss: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(Z, DIRECTION))


WAYS: dict[str, tuple[Callable[[Callable[[Tensor], Tensor]], Any], str]] = {
    "hvp": (lambda loss: functional.hvp(loss, Z, DIRECTION), REFUSED),
    "vhp": (lambda loss: functional.vhp(loss, Z, DIRECTION), REFUSED),
    "hessian": (lambda loss: functional.hessian(loss, Z), REFUSED),
    "jvp by two backwards": (lambda loss: functional.jvp(loss, Z, DIRECTION), REFUSED),
    "penalty": (penalised, REFUSED),
    "forward mode": (dual, "jvp|forward mode"),
    "forward-mode jacobian": (
        lambda loss: functional.jacobian(loss, Z, vectorize=True, strategy="forward-mode"),
        "jvp|forward mode",
    ),
    "many gradients at once": (
        lambda loss: functional.jacobian(loss, Z, vectorize=True),
        "EntropyAwareKL cannot be vectorized",
    ),
    "torch.func.hessian": (lambda loss: torch.func.hessian(loss)(Z), "cannot be transformed by torch.func"),
    "torch.func.jvp": (lambda loss: torch.func.jvp(loss, (Z,), (DIRECTION,)), "cannot be transformed by torch.func"),
}


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_refused(way: str, schedule: str) -> None:
    ask, says = WAYS[way]
    with pytest.raises((RuntimeError, NotImplementedError), match=says):
        ask(lambda z: entropy_aware_kl(z, T, schedule=schedule).loss)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("way", [way for way, (_, says) in WAYS.items() if says == REFUSED])
def test_two_backwards_through_a_compiled_loss_are_refused(way: str, schedule: str) -> None:
    """A tangent of forward mode is dropped by torch.compile itself, of whatever function: that is not refused."""
    torch._dynamo.reset()
    loss = torch.compile(lambda z: entropy_aware_kl(z, T, schedule=schedule).loss, backend="eager")
    with pytest.raises(RuntimeError, match=REFUSED):
        WAYS[way][0](loss)


def test_with_respect_to_a_head() -> None:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = entropy_aware_kl(hidden, T, student_head=LMHead(weight)).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.sum(), weight)


def test_a_first_derivative_with_a_graph_is_right() -> None:
    z = Z.clone().requires_grad_()
    loss = entropy_aware_kl(z, T).loss
    (with_graph,) = torch.autograd.grad(loss, z, create_graph=True)
    (without,) = torch.autograd.grad(entropy_aware_kl(z, T).loss, z)
    assert torch.equal(with_graph.detach(), without) and with_graph.requires_grad


def test_the_student_is_not_kept_alive() -> None:
    """What leads to the student's graph holds none of its numbers."""
    z = Z.clone().requires_grad_() * 1.0
    loss = entropy_aware_kl(z, T).loss
    assert all(t is None or t.data_ptr() != z.data_ptr() for t in loss.grad_fn.saved_tensors)  # type: ignore[union-attr]
