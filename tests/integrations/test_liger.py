"""The class with Liger's signature, against Liger's own."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, entropy_aware_kl
from eopd_kernels.integrations.liger import LigerFusedLinearJSDLoss
from tests.conftest import logits_like, relative_error

from .conftest import require

V, IGNORED = 90, -7
WEIGHTS = ("weight_hard_loss", "weight_soft_loss")


@pytest.fixture
def theirs() -> Any:
    require("liger_kernel")
    return importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss


def inputs(bias: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments of ``forward``, and those that have a gradient. The teacher's require one too, as in use."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = logits_like(generator, 37, 12), logits_like(generator, 37, 20)
    heads = [torch.randn(V, d, generator=generator) / d**0.5 for d in (12, 20)]
    labels = torch.arange(37).masked_fill(torch.arange(37) % 3 == 0, IGNORED)
    biases = [torch.randn(V, generator=generator) for _ in range(2)] if bias else []
    arguments = [student, heads[0], teacher, heads[1], labels, *biases]
    leaves = [t for t in (student, heads[0], *biases[:1])]
    for tensor in (*leaves, heads[1], *biases[1:]):
        tensor.requires_grad_()
    return arguments, leaves


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 2.0), (0.5, 1.0), (0.2, 0.7)])
def test_loss_and_gradients_are_ligers(theirs: Any, beta: float, temperature: float, bias: bool) -> None:
    options: dict[str, Any] = {
        "weight_hard_loss": 0.0,
        "weight_soft_loss": 0.6,
        "beta": beta,
        "temperature": temperature,
    }
    results = []
    for loss in (theirs, LigerFusedLinearJSDLoss):
        arguments, leaves = inputs(bias)
        value = loss(**options, ignore_index=IGNORED, compiled=False, chunk_size=16)(*arguments)
        results.append((value, *torch.autograd.grad(1.7 * value, leaves)))
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 2e-4


@pytest.mark.parametrize("weights", [None, (0.3, 0.9), (0.0, 0.7)])
def test_the_hard_loss_is_ligers(theirs: Any, weights: tuple[float, float] | None) -> None:
    """At Liger's defaults, which are half cross-entropy, and at others; each loss by itself as well."""
    named: dict[str, Any] = {} if weights is None else dict(zip(WEIGHTS, weights, strict=True))
    results = []
    for loss in (theirs, LigerFusedLinearJSDLoss):
        arguments, leaves = inputs(bias=True)
        made = loss(**named, ignore_index=IGNORED, compiled=False, chunk_size=16, return_soft_hard_loss=True)
        value, soft, hard = made(*arguments)
        results.append((value, soft, hard, *torch.autograd.grad(1.7 * value, leaves)))
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 2e-4


def test_nothing_valid_is_zero() -> None:
    arguments, leaves = inputs()
    arguments[4] = torch.full((37,), IGNORED)
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, ignore_index=IGNORED)(*arguments)
    assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, leaves))


def test_the_signature_is_ligers(theirs: Any) -> None:
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(LigerFusedLinearJSDLoss, method)).parameters
        positional = [p for p in found.values() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected.values()]


def test_an_objective_takes_the_place_of_the_jsd() -> None:
    arguments, _ = inputs()
    objective = Objective(gate=EntropyGate(2.0))
    found = LigerFusedLinearJSDLoss(0.0, 1.0, ignore_index=IGNORED, objective=objective)(*arguments)
    logits = [(arguments[i] @ arguments[i + 1].t()).detach() for i in (0, 2)]
    expected = entropy_aware_kl(*logits, labels=arguments[4], ignore_index=IGNORED, objective=objective).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_hard_loss": -1.0}, "weight_hard_loss must be"),
        ({"temperature": 2.0}, "weight_hard_loss must be 0.* Got weight_hard_loss=0.5"),
        ({"weight_soft_loss": 0.0}, "weight_hard_loss must be 0 without a soft loss"),
        ({"objective": Objective(cross_entropy=1.0)}, "beside an objective with a cross_entropy of its own"),
        ({"weight_hard_loss": 0, "beta": 0.1, "objective": Objective()}, "objective replaces beta"),
        ({"weight_hard_loss": 0.0, "weight_soft_loss": -1.0}, "weight_soft_loss must be"),
        ({"weight_hard_loss": 0, "beta": 1.5}, "beta must be"),
        ({"weight_hard_loss": 0, "temperature": 0.0}, "temperature must be"),
    ],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearJSDLoss(**options)


def test_a_student_is_not_padded() -> None:
    arguments, _ = inputs()
    arguments[3] = torch.randn(V + 6, 20)
    with pytest.raises(ValueError, match=r"got 90 and 96 entries.*teacher_weight\[:90\]"):
        LigerFusedLinearJSDLoss(0.0)(*arguments)


def test_what_the_loss_saw_is_added_up_and_how_it_is_computed_can_be_said() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(7, 6, generator=generator) for _ in range(2))
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, schedule="recompute")
    losses = [loss(student[part], weight, teacher[part], weight, torch.zeros(n).long()) for part, n in PARTS]
    means = loss.figures.means()
    assert means["reverse_kl"] == pytest.approx(float((losses[0] * 3 + losses[1] * 4).detach()) / 7)
    last = loss.figures.last_output
    assert last is not None and torch.equal(last.loss, losses[1]) and not last.loss.requires_grad
    with pytest.raises(TypeError, match=r"LigerFusedLinearJSDLoss.* unexpected keyword argument 'chunks'"):
        LigerFusedLinearJSDLoss(weight_hard_loss=0.0, chunks=3)


PARTS = [(slice(0, 3), 3), (slice(3, 7), 4)]
