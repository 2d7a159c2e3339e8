"""Figures to log: means over the tokens that count, sums that add up, and nothing that waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eopd_kernels import (
    EntropyAwareKLOutput,
    EntropyGate,
    Objective,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
    reference,
)
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case
from tests.distributed.processes import run_ranks
from tests.test_objectives import case_of

NAMES = ["teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate"]
OF_TOKENS = ["student_log_probs", "teacher_log_probs"]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def solved(case: Case, rows: Any = slice(None), **options: Any) -> EntropyAwareKLOutput:
    arguments = {n: v[rows] if n in ("mask", *case.per_token) else v for n, v in case.arguments.items()}
    return entropy_aware_kl(case.student[rows], case.teacher[rows], **arguments, **options)


def problem() -> Case:
    """Micro-batches of it have very different numbers of tokens that count."""
    case = case_of(Objective(gate=EntropyGate(2.0)), given=("token_ids",), masked=True, leading=(4, 25))
    assert case.mask is not None
    case.mask[0, :22] = False
    case.per_token["token_ids"][~case.mask] = -100
    return case


@pytest.mark.parametrize("of", [entropy_aware_kl, reference.entropy_aware_kl])
def test_means_are_over_the_tokens_that_count(of: Any) -> None:
    case = problem()
    assert case.mask is not None
    weights = 3.0 * case.mask  # a token is a token, whatever it weighs
    out = of(case.student, case.teacher, **{**case.arguments, "mask": weights})
    means = out.means()
    assert list(means) == NAMES + OF_TOKENS and torch.equal(out.valid, case.mask)
    for name, mean in means.items():
        assert mean.shape == () and mean.dtype == torch.float64 and not mean.requires_grad
        torch.testing.assert_close(mean, getattr(out, name)[case.mask].double().mean(), **CLOSE)  # type: ignore[arg-type]
    assert abs(means["gate"] - out.gate.mean()) > 0.05, "the trap that masked tokens are"


def test_a_token_by_itself_and_none_at_all() -> None:
    student = torch.tensor([0.0, 1.0, -2.0])
    out = entropy_aware_kl(student, student + torch.tensor([1.0, 0.0, 0.0]))
    means = out.means()
    assert list(means) == NAMES
    assert torch.equal(means["forward_kl"], out.forward_kl.double())
    for mask in (torch.zeros(2, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)):
        out = entropy_aware_kl(student.expand(len(mask), 3), student.expand(len(mask), 3), mask=mask)
        assert (out.sums() == 0).all() and all(mean.isnan() for mean in out.means().values())
        assert torch.equal(out.valid, mask)


def test_micro_batches_add_up_to_the_batch() -> None:
    case = problem()
    whole = solved(case)
    parts = [solved(case, rows) for rows in (slice(0, 1), slice(1, 4))]
    total = parts[0].sums() + parts[1].sums()
    assert torch.equal(total[1], whole.sums()[1])
    for name, mean in EntropyAwareKLOutput.means_of(total).items():
        torch.testing.assert_close(mean, whole.means()[name], rtol=1e-6, atol=1e-9)
    averaged = (parts[0].means()["teacher_entropy"] + parts[1].means()["teacher_entropy"]) / 2
    assert abs(averaged - whole.means()["teacher_entropy"]) > 0.01, "means of micro-batches are no mean"


def sums_of_a_rank() -> Tensor:
    sums = solved(problem(), slice(0, 1) if dist.get_rank() == 0 else slice(1, 4)).sums()
    dist.all_reduce(sums)
    return sums


def test_ranks_add_up_to_the_batch() -> None:
    whole = solved(problem()).means()
    for sums in run_ranks(2, sums_of_a_rank):
        for name, mean in EntropyAwareKLOutput.means_of(sums).items():
            torch.testing.assert_close(mean, whole[name], rtol=1e-6, atol=1e-9)


def test_what_is_unknown_leaves_the_others_alone() -> None:
    case = case_of(Objective(gate=EntropyGate(2.0), reverse="none"), given=("token_ids",), masked=True)
    assert case.mask is not None
    out = solved(case)
    opened = out.gate == 1
    means = out.means()
    assert 0.1 < means["gate"] < 0.9
    torch.testing.assert_close(means["gate"], opened[case.mask].double().mean(), **CLOSE)  # type: ignore[arg-type]
    for name in ("student_entropy", "forward_kl", "reverse_kl", "student_log_probs"):
        torch.testing.assert_close(means[name], getattr(out, name)[opened].double().mean(), **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(means["teacher_entropy"], out.teacher_entropy[case.mask].double().mean(), **CLOSE)  # type: ignore[arg-type]

    teacher = TopKTeacher(torch.arange(3).expand(3, 37, 3), torch.full((3, 37, 3), -2.0))
    objective = Objective(reverse="none", forward=TopK(3), gate="always")
    arguments = {**case.arguments, "objective": objective, "teacher_head": None}
    means = entropy_aware_kl(case.student, teacher, **arguments).means()
    assert means["forward_kl"].isnan() and means["reverse_kl"].isnan()
    assert means["gate"] == 1 and means["teacher_entropy"].isfinite() and means["student_entropy"].isfinite()


def test_an_infinite_figure_has_an_infinite_mean() -> None:
    teacher = torch.zeros(2, 3)
    teacher[0, 1] = -torch.inf
    assert entropy_aware_kl(torch.zeros(2, 3), teacher).means()["reverse_kl"] == torch.inf


def test_in_a_graph() -> None:
    torch._dynamo.reset()
    case = make_case(student="logits", teacher="logits", masked=True)

    def means(student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return entropy_aware_kl(student, teacher, mask=mask).means()

    given = (case.student, case.teacher, case.mask)
    compiled = torch.compile(means, backend="aot_eager", fullgraph=True)(*given)  # type: ignore[arg-type]
    for name, mean in means(*given).items():  # type: ignore[arg-type]
        assert torch.equal(compiled[name], mean)


def test_nothing_waits_for_a_gpu() -> None:
    case = case_of(Objective(reverse="none"), given=("token_ids",), masked=True, dtype=torch.bfloat16)
    with pretend.gpu():
        out = solved(case)
        with pretend.Watch():
            EntropyAwareKLOutput.means_of(out.sums() + out.sums())


@pytest.mark.parametrize("shape", [(2, 6), (5,), (2, 5, 1)])
def test_other_sums_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"sums must be \[2, 5\] or \[2, 7\] as EntropyAwareKLOutput.sums gives, got a"
    ):
        EntropyAwareKLOutput.means_of(torch.zeros(shape))


def test_figures_that_are_read_later_are_those_of_the_call() -> None:
    """They are computed when they are read: a mask that has been overwritten meanwhile changes nothing."""
    student, teacher, mask = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1.0, 0.0, 2.0, 0.0])
    out = entropy_aware_kl(student, teacher, mask=mask)
    mask.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    student.zero_(), teacher.zero_()
    assert out.valid.tolist() == [True, False, True, False]
    assert (out.teacher_entropy != 0).tolist() == (out.reverse_half != 0).tolist() == [True, False, True, False]
