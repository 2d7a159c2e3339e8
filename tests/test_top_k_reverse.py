"""What only a top-k reverse half, or a top k of the student, can get wrong: whose S, which masses, what is outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import Objective, TopK, TopKTeacher, entropy_aware_kl
from tests.conftest import relative_error

RAW, TAIL = TopK(4, teacher="raw"), TopK(4, teacher="raw", tail=True)
BOTH = TopK(4, student="renormalized")


def only(half: Any) -> Objective:
    """The reverse half on every token and nothing else."""
    return Objective(gate="never", reverse=half, forward="none")


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(student: Tensor, teacher: Any, objective: Objective, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses of the tokens and the gradient of their sum."""
    leaf = student.clone().requires_grad_()
    out = entropy_aware_kl(leaf, teacher, objective=objective, reduction="none", **options)
    return out.loss.detach(), torch.autograd.grad(out.loss.sum(), leaf)[0]


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("half", [RAW, TAIL, BOTH], ids=str)
def test_it_is_the_sum_over_s(half: TopK, of: Any) -> None:
    """By its definition, with S found by sorting, and autograd's gradient of it."""
    student, teacher = logits(1, 20, 50), logits(2, 20, 50)
    leaf = student.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(1), teacher.log_softmax(1)
    s = (log_q if of == "teacher" else log_p).argsort(1, descending=True)[:, :4].detach()
    inside_p, inside_q = log_p.gather(1, s), log_q.gather(1, s)
    if half is BOTH:
        inside_p, inside_q = inside_p.log_softmax(1), inside_q.log_softmax(1)
    truth = (inside_p.exp() * (inside_p - inside_q)).sum(1)
    if half.tail:
        p_tail, q_tail = 1 - inside_p.exp().sum(1), 1 - inside_q.exp().sum(1)
        truth = truth + p_tail * (p_tail / q_tail).log()
    (gradient,) = torch.autograd.grad(truth.sum(), leaf)
    objective = only(TopK(4, teacher=half.teacher, student=half.student, tail=half.tail, of=of))
    ours = solved(student, teacher, objective)
    assert relative_error(ours[0], truth) < 1e-12 and relative_error(ours[1], gradient) < 1e-12


def test_each_half_has_its_own_s() -> None:
    """Other numbers of entries, and other sides: each half is what it is alone."""
    student, teacher = logits(1, 30, 60), logits(2, 30, 60)
    for reverse in (TopK(3, teacher="raw"), TopK(9, teacher="raw", tail=True), TopK(6, teacher="raw", of="student")):
        for forward in (TopK(5), TopK(7, student="renormalized", of="student")):
            apart = only(reverse), Objective("always", reverse="none", forward=forward)
            alone = [solved(student, teacher, objective) for objective in apart]
            together = solved(student, teacher, Objective("always", reverse=reverse, forward=forward))
            for one, two, both in zip(*alone, together, strict=True):
                torch.testing.assert_close(both, one + two)


def test_a_served_teacher_has_it_over_its_entries() -> None:
    student, teacher = logits(1, 20, 50), logits(2, 20, 50)
    log_probs, ids = teacher.log_softmax(1).topk(4)
    order = torch.randperm(4)
    served = TopKTeacher(ids[:, order], log_probs[:, order])
    for half in (RAW, TAIL, BOTH):
        for one, two in zip(solved(student, served, only(half)), solved(student, teacher, only(half)), strict=True):
            torch.testing.assert_close(one, two)


def test_a_served_teacher_is_not_cut_to_k() -> None:
    """S is what was served, in whatever order, for either half."""
    student, (log_probs, ids) = logits(1, 20, 50), logits(2, 20, 50).log_softmax(1).topk(4)
    served = TopKTeacher(ids.flip(1), log_probs.flip(1))
    for narrow, wide in ((TopK(2, teacher="raw", tail=True), TAIL), (TopK(1, student="renormalized"), BOTH)):
        for halves in ({"reverse": "none"}, {"forward": "none"}):
            (missing,) = {"reverse", "forward"} - set(halves)
            cut, whole = (
                solved(student, served, Objective("always", **halves, **{missing: half}))  # type: ignore[arg-type]
                for half in (narrow, wide)
            )
            assert all(torch.equal(one, two) for one, two in zip(cut, whole, strict=True))


@pytest.mark.parametrize("half", [TAIL, BOTH], ids=str)
def test_a_student_that_equals_the_teacher_stays(half: TopK) -> None:
    teacher = logits(3, 20, 50)
    loss, gradient = solved(teacher, teacher, only(half))
    assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_raw_without_a_tail_pushes_the_mass_out_of_s() -> None:
    """At the teacher the gradient is p·(1 − p(S)) inside and −p·p(S) outside."""
    teacher = logits(3, 20, 50)
    _, gradient = solved(teacher, teacher, only(RAW))
    p, s = teacher.softmax(1), teacher.topk(4).indices
    inside = torch.zeros_like(p).scatter_(1, s, 1.0)
    mass = (p * inside).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, p * (inside - mass))


def test_entries_without_mass() -> None:
    """Of the student's likeliest R is +inf where the teacher has none, of the teacher's such entries are not in S."""
    student, teacher = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    student[0, 0], teacher[0, 0] = 3.0, -torch.inf
    student[:, 5] = teacher[:, 5] = -torch.inf  # padding
    of_student = solved(student, teacher, only(TopK(6, teacher="raw", of="student")))
    full = solved(student, teacher, Objective.reverse_kl())
    for one, two in zip(of_student, full, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    for schedule in ("chunked", "recompute"):
        out = entropy_aware_kl(student, teacher, objective=only(TopK(6, teacher="raw")), schedule=schedule)
        p, log_ratio = student.softmax(1), student.log_softmax(1) - teacher.log_softmax(1)
        truth = (p * log_ratio)[:, 1:5].sum(1)
        torch.testing.assert_close(out.reverse_half, truth)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_only_rows_that_ask_are_searched(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "switch" a shut gate asks for the reverse half's S and an open one for the forward half's."""
    from eopd_kernels.schedules.likeliest import Likeliest

    rows: dict[str, int] = {"teacher": 0, "student": 0}
    found = Likeliest.found

    def counted(of: str, problem: Any, block: Any, *rest: Any) -> Likeliest:
        rows[of] += len(block.student)
        return found(of, problem, block, *rest)

    monkeypatch.setattr(Likeliest, "found", counted)
    gate = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    objective = Objective(combine="switch", reverse=TopK(3, teacher="raw", of="student"), forward=TopK(4))
    # Without a gradient to take the call would look at every row before it knows the gates.
    student = logits(1, 5, 50).requires_grad_()
    entropy_aware_kl(student, logits(2, 5, 50), objective=objective, gate=gate, schedule="chunked", backend=backend)
    assert rows == {"teacher": 2, "student": 3}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Objective(reverse=TopK(8)), "Objective.reverse must be a TopK with teacher='raw'"),
        (lambda: Objective(forward=TopK(of="both")), "TopK.of must be one of"),  # type: ignore[arg-type]
        (
            lambda: entropy_aware_kl(torch.zeros(2, 5), torch.zeros(2, 5), objective=only(TopK(6, teacher="raw"))),
            "TopK.k must be at most the vocabulary's 5 entries, got 6",
        ),
        (
            lambda: entropy_aware_kl(
                torch.zeros(2, 5),
                TopKTeacher(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)),
                objective=only(TopK(1, teacher="raw", of="student")),
            ),
            "TopK.of must be 'teacher' with a TopKTeacher",
        ),
    ],
)
def test_what_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
