"""A cross-entropy term beside the divergence: Objective(cross_entropy=λ)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from eopd_kernels import EntropyGate, LMHead, Objective, Sampled, Skewed, TopK, TopKTeacher, entropy_aware_kl
from tests.conftest import interpreted, relative_error, size
from tests.test_objectives import case_of
from tests.test_oracle import assert_no_worse_than_plain

OBJECTIVES = [
    Objective(gate=EntropyGate(2.0), alpha=0.7, cross_entropy=0.6),
    Objective(gate=EntropyGate(2.0), reverse="none", cross_entropy=0.6),
    Objective(gate=EntropyGate(2.0), reverse=Sampled(), forward=TopK(5), cross_entropy=0.6),
    Objective(reverse=Skewed(0.3), forward=TopK(5, teacher="raw", tail=True), cross_entropy=0.6),
    Objective(gate="never", forward="none", combine="switch", cross_entropy=0.6),
]


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_schedule(objective: Objective, schedule: str, backend: str) -> None:
    if interpreted(backend) and objective is not OBJECTIVES[2]:
        pytest.skip("calls no kernel that another case does not, slowly")
    for student in ("logits", "hidden"):
        case = case_of(objective, student=student, teacher="logits", masked=True, **size(backend))
        assert_no_worse_than_plain(case, schedule=schedule, backend=backend, workspace_bytes=1)


def test_it_is_torch_s() -> None:
    """The mean over the labels that are not ignored, beside the mean of the divergence; labels are those of tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(90, 16, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(3, 7, 90, dtype=torch.float64, generator=generator)
    labels = torch.randint(90, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.3] = -100
    mixed: dict[str, Any] = {"student_head": LMHead(weight), "labels": labels}
    out = entropy_aware_kl(hidden, teacher, objective=Objective(cross_entropy=0.25), **mixed)
    truth = entropy_aware_kl(hidden, teacher, **mixed).loss
    truth = truth + 0.25 * cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, truth)
    leaves = (hidden, weight)
    for one, two in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert relative_error(one, two) < 1e-12
    assert out.student_log_probs is not None
    torch.testing.assert_close(
        -out.student_log_probs[out.valid].mean(),
        cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten()).detach(),
    )


def test_token_ids_go_before_labels() -> None:
    case = case_of(Objective(cross_entropy=1.0), student="logits", teacher="logits")
    others = torch.zeros_like(case.per_token["token_ids"])
    out = entropy_aware_kl(case.student, case.teacher, labels=others, **case.arguments)
    alone = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    assert torch.equal(out.loss, alone.loss)


def test_a_served_teacher() -> None:
    case = case_of(Objective(cross_entropy=1.0), student="logits", teacher="logits", dtype=torch.float64)
    log_probs, ids = case.teacher.log_softmax(-1).topk(5)
    objective = Objective(reverse="none", forward=TopK(), cross_entropy=0.5)
    given = {**case.arguments, "objective": objective}
    out = entropy_aware_kl(case.student, TopKTeacher(ids, log_probs), **given, reduction="none")
    without = entropy_aware_kl(
        case.student,
        TopKTeacher(ids, log_probs),
        **{**given, "objective": replace(objective, cross_entropy=0.0)},
        reduction="none",
    )
    assert out.student_log_probs is not None
    torch.testing.assert_close(out.loss, without.loss - 0.5 * out.student_log_probs)


def test_its_formula() -> None:
    text = str(Objective(cross_entropy=0.5))
    assert "+ 0.5·C" in text and "C = −log p(y)" in text


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"cross_entropy": -1.0}, {}, "Objective.cross_entropy must be"),
        ({"cross_entropy": 1.0, "temperature": 2.0}, {}, "Objective.cross_entropy needs a student at temperature 1"),
        ({"cross_entropy": 1.0}, {}, r"Objective.cross_entropy=1 needs labels= or token_ids="),
        (
            {"cross_entropy": 1.0},
            {"labels": torch.tensor([4, 50])},
            r"token_ids, or labels in their place, must be in \[0, 50\)",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entropy_aware_kl(torch.zeros(2, 50), torch.zeros(2, 50), objective=Objective(**options), **given)
