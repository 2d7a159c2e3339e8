"""The drafter's loss is what its page says: each step's divergence by its definition, over the draft vocabulary."""

from __future__ import annotations

import importlib.util
import runpy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import LMHead, Objective, TopK, entropy_aware_kl
from tests.conftest import logits_like, relative_error

from .test_examples import FOLDER

EXAMPLE: dict[str, Any] = runpy.run_path(str(FOLDER / "drafter.py"), run_name="drafter")
D = EXAMPLE["HIDDEN_SIZE"]


def by_definition(drafter: nn.Module, features: Tensor, embeddings: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """A position and a step at a time, over the entries that ``weight`` has."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sequence in range(features.shape[0]):
        for start in range(features.shape[1]):
            state = features[sequence, start]
            for step in range(EXAMPLE["DRAFT_STEPS"]):
                at = start + step + 1
                if at == features.shape[1]:
                    break
                state = drafter(state, embeddings[sequence, at])
                log_p = (drafter.lm_head.weight @ state).log_softmax(-1)  # type: ignore[union-attr]
                log_q = (weight @ features[sequence, at]).log_softmax(-1)
                total = total + EXAMPLE["DECAY"] ** step * mask[sequence, at] * (log_q.exp() * (log_q - log_p)).sum()
                count += int(mask[sequence, at])
    return total / count


def test_all_steps_in_one_call_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    features, embeddings, head = torch.randn(2, 7, D), torch.randn(2, 7, D), torch.randn(64, D)
    mask = (torch.rand(2, 7) < 0.7).float()
    ids = torch.arange(32) + torch.arange(32)
    drafter = EXAMPLE["Drafter"](head[ids])
    loss = EXAMPLE["drafter_loss"](drafter, features, embeddings, mask, LMHead(head).select(ids))
    loss.backward()
    gradients = [parameter.grad for parameter in drafter.parameters()]
    drafter.double().zero_grad()
    truth = by_definition(drafter, features.double(), embeddings.double(), mask, head[ids].double())
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for found, parameter in zip(gradients, drafter.parameters(), strict=True):
        assert found is not None and parameter.grad is not None and (parameter.grad != 0).any()
        assert relative_error(found, parameter.grad) < 1e-5


@pytest.mark.parametrize(
    ("function", "objective"),
    [
        ("kl_div_loss", Objective.forward_kl()),
        ("reverse_kl_div_loss", Objective.reverse_kl()),
        ("js_div_loss", Objective.jsd(0.5)),
        ("ce_loss", Objective(gate="always", reverse="none", forward=TopK(1))),
    ],
)
def test_speculators_losses_are_these_objectives(function: str, objective: Objective) -> None:
    if importlib.util.find_spec("speculators") is None:
        pytest.skip("speculators is not installed")
    theirs = getattr(importlib.import_module("speculators.losses.eager"), function)
    generator = torch.Generator().manual_seed(0)
    student, target = (logits_like(generator, 1, 6, 320).requires_grad_(grad) for grad in (True, False))
    expected = theirs(student, target)
    found = entropy_aware_kl(student, target, objective=objective, reduction="none").loss
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, 6).unsqueeze(0)
    (gradient,) = torch.autograd.grad(found, student, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student, upstream)[0])
