"""Advantages from outside: a policy gradient that shares its visit with the forward half, or needs no teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eopd_kernels import (
    EntropyAwareKL,
    EntropyAwareKLLoss,
    EntropyGate,
    LMHead,
    Objective,
    QuantileGate,
    Sampled,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
    reference,
)
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case, relative_error, size, skip_unless, upstream_for
from tests.distributed.processes import run_ranks
from tests.distributed.shards import SMALL, part_of
from tests.test_objectives import case_of
from tests.test_oracle import assert_no_worse_than_plain
from tests.test_served_teacher import sparse_teacher_of

SCHEDULES = ["chunked", "recompute"]
DUAL = Sampled(0.1, 0.3, clip_most=1.4)
ALONE = Objective(reverse=DUAL, forward="none", gate="never")
GIVEN = ("advantages",)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("forward", ["full", TopK(5), "none"], ids=str)
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_a_policy_gradient_shares_the_visit(student: str, forward: Any, schedule: str, backend: str) -> None:
    skip_unless(forward == "full" and student == "hidden", backend)
    objective = Objective(gate=EntropyGate(2.0), alpha=0.7, reverse=DUAL, forward=forward, temperature=0.8)
    case = case_of(objective, given=GIVEN, masked=True, student=student, **size(backend))
    assert_no_worse_than_plain(case, schedule=schedule, backend=backend, workspace_bytes=1)


def rl_loss(log_p: Tensor, old: Tensor, advantages: Tensor, half: Sampled) -> Tensor:
    """The dual-clipped loss of a token as RL trainers write it, for an advantage of either sign."""
    ratio = (log_p - old).exp()
    clipped = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - half.clip_low, 1 + half.clip_high))
    if half.clip_most is None:
        return clipped
    return torch.where(advantages < 0, torch.min(clipped, -advantages * half.clip_most), clipped)


@pytest.mark.parametrize("half", [Sampled(), DUAL], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_the_loss_of_rl_trainers(schedule: str, half: Sampled) -> None:
    """Below, within and above the clip and the dual clip, for an advantage of either sign; value and gradient."""
    ratios = torch.tensor([0.5, 0.95, 1.0, 1.2, 1.35, 1.6, 40.0], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([0.7, -1.3], dtype=torch.float64).repeat_interleave(7)
    student = torch.randn(14, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(14) % 9
    log_p = student.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    old = log_p.detach() - ratios.log()
    old = torch.where(old > 0, 0.0, old)
    expected = rl_loss(log_p, old, advantages, half)
    out = entropy_aware_kl(
        student,
        None,
        objective=replace(ALONE, reverse=half),
        token_ids=ids,
        old_log_probs=old,
        advantages=advantages,
        reduction="none" if schedule == "recompute" else "sum",
        schedule=schedule,
    )
    torch.testing.assert_close(out.reverse_half, expected.detach())
    (gradient,) = torch.autograd.grad(out.loss.sum(), student)
    (exact,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, exact)
    followed = (gradient != 0).any(1)
    assert followed.any() and not followed.all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    case = case_of(
        Objective(gate=EntropyGate(2.0), reverse=DUAL),
        given=GIVEN,
        student="logits",
        teacher="logits",
        dtype=torch.float64,
        leading=(9,),
        vocab_size=7,
    )

    def loss(student: Tensor) -> Tensor:
        return entropy_aware_kl(student, case.teacher, **case.arguments, reduction="sum").loss

    (gradient,) = torch.autograd.grad(loss(case.student), case.student)
    step, flat = 1e-6, case.student.detach().reshape(-1)
    with torch.no_grad():
        moves = step * torch.eye(flat.numel(), dtype=torch.float64)
        differences = [
            (loss((flat + m).view_as(case.student)) - loss((flat - m).view_as(case.student))) / (2 * step)
            for m in moves
        ]
    torch.testing.assert_close(gradient.reshape(-1), torch.stack(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_usual_advantage_given_changes_nothing(schedule: str) -> None:
    case = case_of(Objective.eopd_paper(), dtype=torch.float64)
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule)
    assert out.teacher_log_probs is not None
    advantages = out.teacher_log_probs - case.per_token["old_log_probs"]
    given = entropy_aware_kl(case.student, case.teacher, **case.arguments, advantages=advantages, schedule=schedule)
    torch.testing.assert_close(given.loss, out.loss, rtol=1e-12, atol=1e-12)
    for one, two in zip(*(torch.autograd.grad(o.loss, case.leaves) for o in (out, given)), strict=True):
        assert relative_error(one, two) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_served_teacher_need_not_know_the_token(schedule: str) -> None:
    objective = Objective(gate=EntropyGate(1.0), reverse=DUAL, forward=TopK(5, teacher="raw", tail=True))
    case = case_of(objective, given=GIVEN, masked=True)
    served = replace(case, teacher=sparse_teacher_of(case, 6), teacher_head=None)
    assert_no_worse_than_plain(served, schedule=schedule)
    with pytest.raises(ValueError, match="needs its token_log_probs, or advantages=, got None"):
        entropy_aware_kl(served.student, served.teacher, **{**served.arguments, "advantages": None})


class TestWithoutATeacher:
    @staticmethod
    def problem(**options: Any) -> Case:
        """Without teacher; ``teacher`` and ``teacher_head`` may be put back."""
        case = case_of(ALONE, given=GIVEN, **{"masked": True, **options})
        return replace(case, teacher=None, teacher_head=None)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("student", ["logits", "hidden"])
    def test_it_is_what_it_is_beside_any_teacher(self, student: str, schedule: str, backend: str) -> None:
        skip_unless(student == "hidden", backend)
        options: dict[str, Any] = {"schedule": schedule, "backend": backend, "workspace_bytes": 1}
        case = self.problem(student=student, **size(backend))
        teacher = make_case(masked=True, student=student, **size(backend))
        results = []
        for sides in ({}, {"teacher": teacher.teacher, "teacher_head": teacher.teacher_head}):
            run = replace(case, **sides)
            out = entropy_aware_kl(run.student, run.teacher, **run.arguments, **options)
            results.append([out.loss, out.student_entropy, out.reverse_half, out.student_log_probs])
            results[-1] += torch.autograd.grad(out.loss, run.leaves, upstream_for(out.loss))
        for alone, beside in zip(*results, strict=True):
            assert relative_error(alone, beside) < 1e-5
        exact = reference.entropy_aware_kl(case.student, None, **case.arguments)
        assert relative_error(results[0][0], exact.loss) < 1e-5  # type: ignore[arg-type]

    def test_what_concerns_a_teacher_is_unknown(self) -> None:
        case = self.problem()
        assert case.mask is not None
        out = entropy_aware_kl(case.student, None, **case.arguments)
        for name in ("teacher_entropy", "forward_kl", "reverse_kl", "teacher_log_probs"):
            assert torch.equal(getattr(out, name).isnan(), case.mask)
        assert (out.gate == 0).all() and out.student_entropy.isfinite().all() and (out.forward_half == 0).all()
        means = out.means()
        assert means["student_log_probs"] < 0 and means["teacher_entropy"].isnan() and means["gate"] == 0

    @pytest.mark.parametrize(
        "gate", ["always", EntropyGate(2.0, of="student"), QuantileGate(0.5, of="student"), "given"], ids=str
    )
    def test_gates_that_look_at_the_student(self, gate: Any) -> None:
        """With "switch" a gate leaves tokens out of the reverse half."""
        case = self.problem()
        gate, given = (EntropyGate(2.0), {"gate": torch.eye(3, 37)}) if gate == "given" else (gate, {})
        objective = Objective(gate=gate, reverse=DUAL, forward="none", combine="switch")
        case = replace(case, objective=objective, per_token={**case.per_token, **given})
        out = entropy_aware_kl(case.student, None, **case.arguments)
        assert torch.equal(out.reverse_half == 0, (out.gate == 1) | ~out.valid)
        assert out.loss.isfinite() and (gate == "always") == bool((out.loss == 0).all())

    def test_the_module_and_apply_take_none(self) -> None:
        case = self.problem()
        assert case.student_head is not None
        expected = entropy_aware_kl(case.student, None, **case.arguments)
        tensors = {"mask": case.mask, **case.per_token}
        module = EntropyAwareKLLoss(ALONE)(case.student, None, student_head=case.student_head, **tensors)
        applied = EntropyAwareKL.apply(case.student, None, case.student_head.weight, objective=ALONE, **tensors)  # type: ignore[arg-type]
        assert torch.equal(module.loss, expected.loss) and torch.equal(applied, expected.loss)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_in_a_graph(self, schedule: str) -> None:
        torch._dynamo.reset()
        case = self.problem(student="logits")

        def loss(student: Tensor, mask: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
            return entropy_aware_kl(
                student,
                None,
                objective=ALONE,
                mask=mask,
                token_ids=ids,
                old_log_probs=old,
                advantages=advantages,
                schedule=schedule,
            ).loss

        given = (case.student, case.mask, *case.per_token.values())
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        results = [(run(*given), *torch.autograd.grad(run(*given), case.student)) for run in (compiled, loss)]  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_nothing_waits_for_a_gpu(self, schedule: str) -> None:
        case, num_items = self.problem(dtype=torch.bfloat16), torch.tensor(7)
        with pretend.gpu(), pretend.Watch():
            options: dict[str, Any] = {"schedule": schedule, "num_items": num_items, "wait_free": True}
            entropy_aware_kl(case.student, None, **case.arguments, **options).loss.backward()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"advantages": None}, "teacher=None needs advantages= of the leading shape"),
            (
                {"objective": replace(ALONE, reverse="full")},
                "teacher=None needs Objective.reverse='sampled' and forward",
            ),
            (
                {"objective": replace(ALONE, forward="full")},
                "teacher=None needs Objective.reverse='sampled' and forward",
            ),
            ({"objective": replace(ALONE, gate=EntropyGate())}, "an Objective.gate that looks at no teacher, such as"),
            ({"objective": replace(ALONE, gate=QuantileGate())}, "an Objective.gate that looks at no teacher, such as"),
            ({"teacher_head": LMHead(torch.zeros(611, 4))}, "teacher_head must be None without a teacher"),
        ],
    )
    def test_what_is_refused(self, change: dict[str, Any], says: str) -> None:
        case = self.problem()
        with pytest.raises(ValueError, match=says):
            entropy_aware_kl(case.student, None, **{**case.arguments, **change})


def errors_among_ranks() -> list[float]:
    """Without a teacher: loss and gradients of two shards against those of one process."""
    case, errors = TestWithoutATeacher.problem(), []
    whole = entropy_aware_kl(case.student, None, **case.arguments)
    exact = torch.autograd.grad(whole.loss, case.leaves)
    # Cutting wants something to cut on the teacher's side too.
    options: dict[str, Any] = {"tensor_parallel_group": dist.group.WORLD, **SMALL}
    part, here = part_of(replace(case, teacher=TopKTeacher(torch.zeros(1, 1).long(), torch.zeros(1, 1))), [200, 411])
    for schedule in SCHEDULES:
        out = entropy_aware_kl(part.student, None, **part.arguments, **options, schedule=schedule)
        hidden, weight = torch.autograd.grad(out.loss, part.leaves)
        errors += [relative_error(out.loss, whole.loss), relative_error(out.student_log_probs, whole.student_log_probs)]  # type: ignore[arg-type]
        errors += [relative_error(hidden, exact[0]), relative_error(weight, exact[1][here])]
    return errors


def test_ranks_agree_without_a_teacher() -> None:
    for errors in run_ranks(2, errors_among_ranks):
        assert max(errors) < 5e-6


@pytest.mark.parametrize("value", [1.0, 0.5, float("inf"), "3"])
def test_a_bound_that_would_cut_the_policy_itself_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Sampled.clip_most must be a"):
        Sampled(clip_most=value)
