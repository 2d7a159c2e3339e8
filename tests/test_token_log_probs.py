"""Log-probabilities of the sampled token: what every objective returns with ``token_ids=``, and what gates see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import (
    EntropyGate,
    Objective,
    QuantileGate,
    RowStatistics,
    Sampled,
    Skewed,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
    reference,
)
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case, relative_error, size, skip_unless
from tests.test_objectives import case_of
from tests.test_oracle import assert_no_worse_than_plain
from tests.test_served_teacher import sparse_teacher_of

SCHEDULES = ["chunked", "recompute"]
OBJECTIVES = [
    Objective(gate=EntropyGate(2.0), temperature=(0.7, 2.0)),
    Objective(gate=EntropyGate(2.0, sharpness=2.0), temperature=(0.7, 2.0)),
    Objective(reverse=Sampled(), forward=TopK(5)),
    Objective(reverse=Skewed(0.3), forward="none", gate="never"),
]
UNKNOWN = "statistics.student_token_log_prob needs token_ids= of the leading shape, got None"


def mask_of(case: Case) -> Tensor:
    assert case.mask is not None
    return case.mask


def by_definition(case: Case) -> tuple[Tensor, Tensor]:
    """log p(y) and log q(y) in fp64, 0 where masked."""
    ids = case.per_token["token_ids"].clamp(min=0).unsqueeze(-1)
    values = []
    sides = ((case.student, case.student_head), (case.teacher, case.teacher_head))
    for (side, head), temperature in zip(sides, case.objective.temperatures, strict=True):
        vocab_size = side.shape[-1] if head is None else len(head.weight)
        z = reference.transformed_logits(side.detach().double(), head, vocab_size, temperature)
        values.append(z.log_softmax(-1).view(*side.shape[:-1], -1).gather(-1, ids).squeeze(-1))
        if case.mask is not None:
            values[-1] = values[-1] * case.mask
    return values[0].detach(), values[1].detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: str(o).split("\n")[0])
@pytest.mark.parametrize("sides", [("logits", "logits"), ("hidden", "hidden"), ("hidden", "logits")])
def test_they_are_what_they_are_called(
    sides: tuple[str, str], objective: Objective, schedule: str, backend: str
) -> None:
    skip_unless(objective is OBJECTIVES[0] or sides == ("hidden", "hidden"), backend)
    student, teacher = sides
    case = case_of(objective, given=("token_ids",), masked=True, student=student, teacher=teacher, **size(backend))
    mask = mask_of(case)
    options: dict[str, Any] = {"schedule": schedule, "backend": backend, "workspace_bytes": 1}
    assert_no_worse_than_plain(case, **options)
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, **options)
    for value, exact in zip((out.student_log_probs, out.teacher_log_probs), by_definition(case), strict=True):
        assert value is not None and value.dtype == torch.float32 and not value.requires_grad
        assert relative_error(value, exact) < 1e-5 and (value[~mask] == 0).all()
        assert (exact < -0.5).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    case = case_of(Objective(), given=("token_ids",), dtype=dtype)
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    for value, exact in zip((out.student_log_probs, out.teacher_log_probs), by_definition(case), strict=True):
        assert value is not None and value.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert relative_error(value, exact) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_the_gradient_may_take_the_logits_memory() -> None:
    case = case_of(Objective(), given=("token_ids",), student="logits", teacher="logits")
    expected = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    out = entropy_aware_kl(case.student * 1, case.teacher, **case.arguments, inplace=True)
    assert torch.equal(out.student_log_probs, expected.student_log_probs)  # type: ignore[arg-type]
    assert torch.equal(out.teacher_log_probs, expected.teacher_log_probs)  # type: ignore[arg-type]


def test_the_vocabulary_may_be_cut() -> None:
    case = make_case(student="logits", teacher="logits")
    ids = torch.arange(111).view(3, 37)
    cut = entropy_aware_kl(case.student, case.teacher, token_ids=ids, vocab_size=300)
    alone = entropy_aware_kl(case.student[..., :300], case.teacher[..., :300], token_ids=ids)
    assert torch.equal(cut.student_log_probs, alone.student_log_probs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 100\) where they count, got 110"):
        entropy_aware_kl(case.student, case.teacher, token_ids=ids, vocab_size=100)


def test_without_token_ids_there_are_none() -> None:
    case = make_case()
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    assert out.student_log_probs is None and out.teacher_log_probs is None
    with pytest.raises(ValueError, match=UNKNOWN):
        objective = Objective(gate=lambda statistics: statistics.student_token_log_prob)
        entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "objective": objective})
    with pytest.raises(ValueError, match=UNKNOWN.replace("student", "teacher")):
        RowStatistics(torch.ones(1, 8)).teacher_token_log_prob  # noqa: B018


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gate", [EntropyGate(2.0), QuantileGate(0.7), "given"], ids=str)
def test_tokens_that_were_left_out(gate: Any, schedule: str) -> None:
    """Without a reverse half a shut token's student is not looked at; its teacher is, unless the gate was given."""
    given = ("token_ids", "gate") if gate == "given" else ("token_ids",)
    objective = Objective(reverse="none", gate=EntropyGate(2.0) if gate == "given" else gate)
    case = case_of(objective, given=given, masked=True)
    schedule = "auto" if isinstance(gate, QuantileGate) else schedule
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule, workspace_bytes=1)
    shut = (out.gate == 0) & mask_of(case)
    assert 0.1 < shut.double().mean() < 0.9
    assert torch.equal(out.student_entropy.isnan(), shut) and torch.equal(out.student_log_probs.isnan(), shut)  # type: ignore[union-attr]
    assert torch.equal(out.teacher_log_probs.isnan(), shut if gate == "given" else shut & False)  # type: ignore[union-attr]
    for value, exact in zip((out.student_log_probs, out.teacher_log_probs), by_definition(case), strict=True):
        known = ~value.isnan()  # type: ignore[union-attr]
        assert relative_error(value[known], exact[known]) < 1e-5  # type: ignore[index]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reverse", ["none", Sampled()], ids=str)
def test_a_served_teacher_says_what_it_knows(reverse: Any, schedule: str) -> None:
    objective = Objective(gate="always", reverse=reverse, forward=TopK(5))
    case = case_of(objective, given=("token_ids",), masked=True)
    teacher = sparse_teacher_of(case, 6)
    ids = teacher.ids[..., 0].clone()
    ids[:, ::3] = 7  # seldom among the entries
    ids[:, 1::3] = 0  # what a missing one has in its place
    case = replace(case, per_token={**case.per_token, "token_ids": ids.clamp(min=0)}, teacher_head=None)
    present = (teacher.ids == ids.unsqueeze(-1)) & (teacher.log_probs > -torch.inf)
    expected = torch.where(present.any(-1), torch.where(present, teacher.log_probs, 0.0).sum(-1), torch.nan)
    assert 0.2 < expected.isnan().double().mean() < 0.8
    given = torch.rand(ids.shape) - 3
    if reverse == "none":
        out = entropy_aware_kl(case.student, teacher, **case.arguments, schedule=schedule)
        torch.testing.assert_close(out.teacher_log_probs, expected.masked_fill(~mask_of(case), 0.0), equal_nan=True)
    teacher = TopKTeacher(teacher.ids, teacher.log_probs, token_log_probs=given)
    out = entropy_aware_kl(case.student, teacher, **case.arguments, schedule=schedule)
    torch.testing.assert_close(out.teacher_log_probs, given * mask_of(case))
    case = replace(case, teacher=case.teacher, teacher_head=make_case().teacher_head)
    assert relative_error(out.student_log_probs, by_definition(case)[0]) < 1e-5  # type: ignore[arg-type]


def test_a_callable_gate_sees_them() -> None:
    """AOPD's idea: the forward half where the teacher likes the sampled token less than the student does."""
    seen = []

    def disagreeing(statistics: RowStatistics) -> Tensor:
        seen.append((statistics.student_token_log_prob, statistics.teacher_token_log_prob))
        return statistics.teacher_token_log_prob < statistics.student_token_log_prob

    case = case_of(Objective(gate=disagreeing), given=("token_ids",), masked=True, student="logits", teacher="logits")
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    truth = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments)
    log_p, log_q = by_definition(case)
    mask = mask_of(case)
    assert len(seen) == 2 and all(torch.equal(s.isnan().view(mask.shape), ~mask) for s in seen[0])
    assert torch.equal(out.gate.bool(), (log_q < log_p) & mask) and torch.equal(out.gate, truth.gate)
    assert 0.1 < out.gate.mean() < 0.9 and relative_error(out.loss, truth.loss) < 1e-5


def test_a_token_without_mass() -> None:
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    student[0, 1] = teacher[1, 1] = -torch.inf
    for schedule in SCHEDULES:
        out = entropy_aware_kl(student, teacher, token_ids=torch.tensor([1, 1]), schedule=schedule)
        assert out.student_log_probs is not None and out.teacher_log_probs is not None
        assert out.student_log_probs[0] == out.teacher_log_probs[1] == -torch.inf
        assert out.student_log_probs[1].isfinite() and out.teacher_log_probs[0].isfinite()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_waits_for_a_gpu_and_nothing_grows_with_the_vocabulary(schedule: str) -> None:
    peaks = []
    for given in ((), ("token_ids",)):
        case = case_of(Objective(), given=given, leading=(256,), vocab_size=8192)
        with pretend.PeakMemory() as memory:
            entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule, workspace_bytes=2**22)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 64 * 256
    case = case_of(Objective(), given=("token_ids",), masked=True, dtype=torch.bfloat16)
    num_items = torch.tensor(7)
    with pretend.gpu(), pretend.Watch():
        entropy_aware_kl(
            case.student, case.teacher, **case.arguments, num_items=num_items, schedule=schedule, wait_free=True
        )
