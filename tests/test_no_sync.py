"""Nothing on the way of a GPU's tensors waits for the device: every objective, on a GPU that is pretended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, LMHead, Objective, QuantileGate, TopK, TopKTeacher, entropy_aware_kl
from eopd_kernels.testing import pretend
from tests.conftest import make_case

OBJECTIVES = {
    "default": Objective(),
    "paper": Objective.eopd_paper(),
    "tail": Objective(forward=TopK(4, teacher="raw", tail=True)),
    "forward": Objective(reverse="none"),
    "top k alone": Objective(reverse="none", forward="top_k"),
    "jsd": Objective.jsd(0.3),
    "soft gate": Objective(gate=EntropyGate(of="student", sharpness=2.0), combine="blend"),
    "quantile": Objective(gate=QuantileGate(0.5)),
}
SERVED = ("paper", "top k alone")  # what a TopKTeacher can be asked for


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize(
    ("objective", "teacher"),
    [*((o, "dense") for o in OBJECTIVES.values()), *((OBJECTIVES[name], "served") for name in SERVED)],
    ids=[*OBJECTIVES, *(f"{name}, served" for name in SERVED)],
)
def test_no_objective_waits(objective: Objective, teacher: str, kind: str, schedule: str) -> None:
    if schedule == "chunked" and isinstance(objective.gate, QuantileGate):
        schedule = "auto"
    case = make_case(leading=(3, 20), student=kind, teacher=kind, masked=True, bias=True)
    shape = case.student.shape[:-1]
    options: dict[str, Any] = {
        "token_ids": torch.arange(60).view(shape),
        "old_log_probs": torch.full(shape, -2.0),
        "reverse_weights": torch.full(shape, 0.5),
        "forward_weights": torch.full(shape, 0.7),
        "labels": torch.arange(60).view(shape) - 100,
        "num_items": torch.tensor(50),
    }
    given: Tensor | TopKTeacher = case.teacher
    if teacher == "served":
        ids = torch.arange(240).view(*shape, 4)
        log_probs = torch.full(ids.shape, -1.5)
        given = TopKTeacher(ids, log_probs, token_log_probs=torch.full(shape, -2.5), valid=ids % 5 != 0)
    arguments = case.arguments | options | {"objective": objective, "schedule": schedule, "workspace_bytes": 2**17}
    if teacher == "served":
        arguments["teacher_head"] = None
    upstream = torch.tensor(1.3)
    with pretend.gpu(), pretend.Watch() as watch:
        out = entropy_aware_kl(case.student, given, **arguments, wait_free=True)
        out.loss.backward(upstream)
    assert bool(watch.products) == (kind == "hidden")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in case.leaves)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_are_counted_once(name: str, schedule: str) -> None:
    objective = OBJECTIVES[name]
    schedule = "auto" if isinstance(objective.gate, QuantileGate) else schedule
    case = make_case(leading=(3, 20), masked=True)
    shape = case.student.shape[:-1]
    arguments = case.arguments | {
        "objective": objective,
        "schedule": schedule,
        "token_ids": torch.arange(60).view(shape),
        "old_log_probs": torch.full(shape, -2.0),
        "num_items": torch.tensor(50),
    }
    upstream = torch.tensor(1.3)
    with pretend.gpu(), pretend.Watch(waits=1) as watch:
        entropy_aware_kl(case.student, case.teacher, **arguments).loss.backward(upstream)
    assert watch.waits == 0 and watch.products


def test_the_watch_sees_a_wait() -> None:
    mask = torch.tensor([True, False])
    for wait in (lambda: mask.nonzero(), lambda: mask[0].item(), lambda: mask[mask], lambda: mask.unique()):
        with pytest.raises(AssertionError, match="wait"), pretend.Watch():
            wait()


def test_a_gate_of_the_callers_own_does_not_wait() -> None:
    case = make_case(leading=(3, 20))
    assert isinstance(case.student_head, LMHead)
    with pretend.gpu(), pretend.Watch():
        gate = torch.ones(case.student.shape[:-1])
        entropy_aware_kl(case.student, case.teacher, **case.arguments, gate=gate).loss.sum()
