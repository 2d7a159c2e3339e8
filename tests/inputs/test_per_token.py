"""What is said of each token: what is refused, and what is ignored where a token does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import Objective, TopK, entropy_aware_kl
from eopd_kernels.testing import pretend

S = torch.zeros(2, 3, 8)
IDS, OLD = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
ADDITIVE = torch.zeros(2, 3).masked_fill(torch.arange(3) > 1, -torch.inf)
SAMPLED = {"objective": Objective.on_policy_distillation(), "token_ids": IDS, "old_log_probs": OLD}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {**SAMPLED, "token_ids": None},
            ValueError,
            "Objective.reverse='sampled' needs token_ids= of the leading shape",
        ),
        ({**SAMPLED, "old_log_probs": None}, ValueError, "Objective.reverse='sampled' needs old_log_probs="),
        ({**SAMPLED, "token_ids": OLD}, TypeError, "token_ids must be an integer tensor, got a float32 tensor"),
        ({**SAMPLED, "token_ids": IDS > 0}, TypeError, "token_ids must be an integer tensor, got a bool tensor"),
        ({**SAMPLED, "token_ids": [1]}, TypeError, "token_ids must be a tensor of integer numbers or None, got a list"),
        ({**SAMPLED, "token_ids": IDS[0]}, ValueError, "token_ids must have the leading shape (2, 3), got (3,)"),
        ({**SAMPLED, "token_ids": IDS + 8}, ValueError, "token_ids must be in [0, 8) where they count, got 8"),
        ({**SAMPLED, "token_ids": IDS - 100}, ValueError, "token_ids must be in [0, 8) where they count, got -100"),
        ({**SAMPLED, "old_log_probs": OLD[:, :1]}, ValueError, "old_log_probs must have the leading shape (2, 3)"),
        (
            {**SAMPLED, "old_log_probs": OLD + 0.2},
            ValueError,
            "old_log_probs must be at most 0 where they count, got a",
        ),
        ({"old_log_probs": OLD + 0.2}, ValueError, "old_log_probs must be at most 0 where they count"),
        ({"mask": OLD - 1}, ValueError, "mask must be finite and at least 0 where it counts"),
        ({"mask": IDS - 1}, ValueError, "mask must be finite and at least 0 where it counts"),
        ({"mask": OLD / 0}, ValueError, "mask must be finite and at least 0 where it counts"),
        ({"mask": 1 / OLD}, ValueError, "mask must be finite and at least 0 where it counts"),
        ({"mask": ADDITIVE}, ValueError, "of an additive attention mask (0 and -inf) pass mask == 0"),
        ({"mask": ADDITIVE.clamp(min=-3e38)}, ValueError, "of an additive attention mask (0 and -inf)"),
        ({**SAMPLED, "advantages": OLD[0]}, ValueError, "advantages must have the leading shape (2, 3), got (3,)"),
        ({**SAMPLED, "advantages": 1.0}, TypeError, "advantages must be a tensor of real numbers or None"),
        (
            {**SAMPLED, "advantages": OLD.clone().requires_grad_()},
            ValueError,
            "advantages requires grad, but the loss is never differentiated with respect to advantages",
        ),
        ({"advantages": OLD}, ValueError, "advantages= are those of Objective.reverse='sampled', got reverse='full'"),
        ({"gate": OLD[0]}, ValueError, "gate must have the leading shape (2, 3), got (3,)"),
        ({"gate": 1.0}, TypeError, "gate must be a tensor of real numbers or None, got 1.0 of type float"),
        ({"reverse_weights": OLD + 1j}, TypeError, "reverse_weights must be a tensor of real numbers or None"),
        ({"forward_weights": OLD[0]}, ValueError, "forward_weights must have the leading shape (2, 3), got (3,)"),
        (
            {**SAMPLED, "old_log_probs": OLD.clone().requires_grad_()},
            ValueError,
            "old_log_probs requires grad, but the loss is never differentiated with respect to old_log_probs: pass it",
        ),
        ({"gate": OLD.to("meta")}, ValueError, "got student on cpu and gate on meta"),
        (
            {"objective": Objective(forward=TopK(9))},
            ValueError,
            "TopK.k must be at most the vocabulary's 8 entries, got 9",
        ),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        entropy_aware_kl(S, S, **options)
    assert says in str(raised.value)


def test_what_does_not_count_may_be_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, generator=generator).unbind()
    labels = torch.tensor([1, -100, 3, 4, -100, 0])
    old = torch.where(labels == -100, torch.nan, -2.0)
    objective = Objective(reverse="sampled", forward=TopK(3))
    arguments: dict[str, Any] = {"objective": objective, "labels": labels, "token_ids": labels, "old_log_probs": old}
    gate = torch.where(labels == -100, torch.nan, 0.5)
    student.requires_grad_()
    out = entropy_aware_kl(student, teacher, **arguments, gate=gate, reverse_weights=gate, forward_weights=gate)
    out.loss.backward()
    assert out.loss.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert (student.grad[labels == -100] == 0).all() and (out.gate[labels == -100] == 0).all()
    known = labels != -100
    alone = entropy_aware_kl(
        student.detach()[known],
        teacher[known],
        objective=objective,
        token_ids=labels[known],
        old_log_probs=old[known],
        gate=gate[known],
        reverse_weights=gate[known],
        forward_weights=gate[known],
    )
    torch.testing.assert_close(out.loss.detach(), alone.loss)


def test_what_is_refused_counts_and_is_no_rounding() -> None:
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]])
    strange = torch.where(labels == -100, torch.nan, 1.0)
    out = entropy_aware_kl(S, S, mask=strange, labels=labels, old_log_probs=strange - 0.9)
    assert out.loss.isfinite() and torch.equal(out.valid, labels != -100)


def test_a_device_is_not_asked_for_weights() -> None:
    with pretend.gpu(), pretend.Watch():
        entropy_aware_kl(S, S, mask=ADDITIVE, old_log_probs=OLD)


def test_a_graph_refuses_when_it_runs() -> None:
    torch._dynamo.reset()

    def loss(student: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        return entropy_aware_kl(student, student, mask=mask, old_log_probs=old_log_probs).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert compiled(S, OLD + 1, OLD) == 0
    with pytest.raises(ValueError, match="mask must be finite and at least 0"):
        compiled(S, ADDITIVE, OLD)
    with pytest.raises(ValueError, match="old_log_probs must be at most 0"):
        compiled(S, OLD + 1, OLD + 1)


def test_no_tokens_at_all() -> None:
    student = torch.zeros(0, 8, requires_grad=True)
    nothing, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for objective in (Objective(reverse="sampled", forward=TopK(3)), Objective.jsd(), Objective(reverse="none")):
        out = entropy_aware_kl(student, student.detach(), objective=objective, token_ids=ids, old_log_probs=nothing)
        out.loss.backward()
        assert out.loss == 0 and out.gate.shape == (0,)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_a_batch_in_which_nothing_counts(schedule: str) -> None:
    student, ids = torch.zeros(3, 8, requires_grad=True), torch.full((3,), -100)
    old = torch.full((3,), torch.nan)
    for objective in (Objective(reverse="sampled", forward=TopK(3)), Objective.jsd(), Objective(reverse="none")):
        out = entropy_aware_kl(
            student,
            student.detach() + torch.nan,
            objective=objective,
            labels=ids,
            token_ids=ids,
            old_log_probs=old,
            schedule=schedule,
        )
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert out.loss == 0 and (gradient == 0).all()
