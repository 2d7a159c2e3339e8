"""What is not finite: a NaN is seen whatever the objective, and an infinite half has the gradient of math.md."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import (
    EntropyGate,
    LMHead,
    Objective,
    QuantileGate,
    Skewed,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
    reference,
)
from tests.conftest import skip_unless

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 3, 40, generator=GENERATOR).unbind()
COLUMN = 7
IDS = torch.tensor([[0, 1], [2, 3], [4, 5]])
LOG_PROBS = torch.full((3, 2), -1.0)
PER_TOKEN: dict[str, Any] = {"token_ids": torch.tensor([1, 2, 3]), "old_log_probs": torch.full((3,), -2.0)}

DENSE = {
    "default": Objective(gate=EntropyGate(2.0)),
    "forward": Objective.forward_kl(),
    "forward, gated": Objective(reverse="none", gate=EntropyGate(2.0)),
    "forward, normalized gate": Objective(reverse="none", gate=EntropyGate(0.5, normalized=True)),
    "forward, soft gate": Objective(reverse="none", gate=EntropyGate(2.0, sharpness=1.0)),
    "forward, quantile": Objective(reverse="none", gate=QuantileGate(0.5)),
    "switch": Objective(combine="switch", gate=EntropyGate(2.0)),
    "reverse": Objective.reverse_kl(),
    "jsd": Objective.jsd(),
    "top k": Objective(reverse="none", forward=TopK(3)),
    "top k, tail": Objective(reverse="none", forward=TopK(3, teacher="raw", tail=True), gate="always"),
}


# Where kernels are interpreted: one objective for each kernel, and one for each way that a gate is found.
TELLING = ("default", "forward", "forward, gated", "jsd", "top k")


def solved(student: Tensor, teacher: Any, **options: Any) -> tuple[Any, Tensor]:
    leaf = student.clone().requires_grad_()
    out = entropy_aware_kl(leaf, teacher, **options, **(PER_TOKEN if isinstance(teacher, TopKTeacher) else {}))
    return out, torch.autograd.grad(out.loss.sum(), leaf)[0]


@pytest.mark.parametrize(("gate", "value"), [("always", 1.0), ("never", 0.0)])
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_a_gate_that_asks_nobody_is_no_nan(schedule: str, gate: Any, value: float, backend: str) -> None:
    teacher = TEACHER.clone()
    teacher[1, COLUMN] = math.nan
    out, _ = solved(STUDENT, teacher, objective=Objective(gate=gate), backend=backend, schedule=schedule)
    assert out.teacher_entropy.isnan().tolist() == [False, True, False]
    assert out.gate.tolist() == [value] * 3


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", DENSE)
def test_a_nan_is_seen_in_the_loss_of_its_row(name: str, side: str, hidden: bool, backend: str) -> None:
    """Not least the teacher's: a gate that it shuts would leave the row out, and training would go on with nothing."""
    skip_unless(not hidden and name in TELLING, backend)
    student, teacher = STUDENT.clone(), TEACHER.clone()
    (student if side == "student" else teacher)[1, COLUMN] = math.nan
    options: dict[str, Any] = {"backend": backend, "objective": DENSE[name]}
    if hidden:
        options |= {"student_head": LMHead(torch.eye(40))}
        student = student.nan_to_num(3e38) if side == "student" else student
        if side == "student":
            student[1] = math.nan
    out, gradient = solved(student, teacher, **options, reduction="none")
    assert out.loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and gradient[::2].isfinite().all()
    if side == "teacher" and isinstance(DENSE[name].gate, EntropyGate):
        assert out.gate.isnan().tolist() == [False, True, False]
    assert solved(student, teacher, **options)[0].loss.isnan()


@pytest.mark.parametrize("what", ["log_probs", "entropy", "token_log_probs"])
def test_a_nan_that_was_served_is_seen(what: str) -> None:
    tensors = {"log_probs": LOG_PROBS, "entropy": torch.full((3,), 2.0), "token_log_probs": torch.full((3,), -1.0)}
    tensors[what] = tensors[what].clone()
    tensors[what][1] = math.nan
    objective = Objective(reverse="sampled", forward=TopK(2), gate=EntropyGate(1.0))
    out, gradient = solved(STUDENT, TopKTeacher(IDS, **tensors), objective=objective, reduction="none")
    assert out.loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and gradient[::2].isfinite().all()


def test_log_probabilities_above_0_are_refused_and_rounding_is_not() -> None:
    objective = Objective(reverse="sampled", forward=TopK(2))
    above, rounded = LOG_PROBS.clone(), LOG_PROBS.clone()
    above[1, 1], rounded[1, 1] = 0.5, 1e-3
    token, high = torch.full((3,), -1.0), torch.tensor([-1.0, 0.5, -1.0])
    solved(STUDENT, TopKTeacher(IDS, rounded, token_log_probs=token), objective=objective)
    with pytest.raises(ValueError, match=r"TopKTeacher.log_probs must be at most 0 where they count"):
        solved(STUDENT, TopKTeacher(IDS, above, token_log_probs=token), objective=objective)
    with pytest.raises(ValueError, match=r"TopKTeacher.token_log_probs must be at most 0 where they count"):
        solved(STUDENT, TopKTeacher(IDS, LOG_PROBS, token_log_probs=high), objective=objective)
    # What does not count may be anything.
    mask = torch.tensor([1, 0, 1])
    solved(STUDENT, TopKTeacher(IDS, above, token_log_probs=high), objective=objective, mask=mask)
    missing = torch.tensor([[True, True], [True, False], [True, True]])
    solved(STUDENT, TopKTeacher(IDS, above, valid=missing, token_log_probs=token), objective=objective)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_an_infinite_forward_half_has_a_finite_gradient(schedule: str, backend: str) -> None:
    """F = ∞ where the student has no mass on a column of the teacher's; ∂F/∂z = p − q is finite, as cross-entropy's."""
    student = STUDENT.clone()
    student[1, COLUMN] = -torch.inf
    out, gradient = solved(student, TEACHER, objective=Objective.forward_kl(), schedule=schedule, backend=backend)
    assert out.loss == torch.inf and out.forward_kl.isinf().tolist() == [False, True, False]
    expected = (torch.softmax(student.double(), -1) - torch.softmax(TEACHER.double(), -1)) / 3
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("objective", [Objective.reverse_kl(), Objective(gate="always")], ids=["reverse", "both"])
def test_an_infinite_reverse_half_has_an_infinite_gradient(objective: Objective, schedule: str, backend: str) -> None:
    """R = ∞ where the teacher has no mass on a column of the student's. Lowering any other column's logit would raise
    R without bound: −∞ there. At the column itself ∞ − ∞ is not a number. Autograd of the definition says the same."""
    teacher = TEACHER.clone()
    teacher[1, COLUMN] = -torch.inf
    out, gradient = solved(STUDENT, teacher, objective=objective, schedule=schedule, backend=backend)
    assert out.loss == torch.inf and out.reverse_kl.isinf().tolist() == [False, True, False]
    others = torch.arange(40) != COLUMN
    assert (gradient[1, others] == -torch.inf).all() and gradient[1, COLUMN].isnan()
    assert gradient[::2].isfinite().all()
    leaf = STUDENT.double().requires_grad_()
    truth = reference.entropy_aware_kl(leaf, teacher.double(), objective=objective).loss
    (expected,) = torch.autograd.grad(truth, leaf)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_an_infinite_half_without_weight_does_no_harm(backend: str) -> None:
    student, teacher = STUDENT.clone(), TEACHER.clone()
    teacher[1, COLUMN] = -torch.inf
    out, gradient = solved(student, teacher, objective=Objective.forward_kl(), backend=backend)
    assert out.loss.isfinite() and gradient.isfinite().all()
    student[2, COLUMN] = -torch.inf
    out, gradient = solved(student, TEACHER, objective=Objective.reverse_kl(), backend=backend)
    assert out.loss.isfinite() and gradient.isfinite().all()


def test_the_specification_has_a_gradient_where_both_sides_suppress_an_entry() -> None:
    student, teacher = STUDENT.double(), TEACHER.double()
    student[:, COLUMN] = teacher[:, COLUMN] = -torch.inf
    leaf = student.requires_grad_()
    objective = Objective("always", reverse="none", forward=Skewed(0.3))
    (expected,) = torch.autograd.grad(reference.entropy_aware_kl(leaf, teacher, objective=objective).loss, leaf)
    (gradient,) = torch.autograd.grad(entropy_aware_kl(leaf, teacher, objective=objective).loss, leaf)
    torch.testing.assert_close(gradient, expected)
