"""A teacher of a few entries: which of them count, the entropy's bound, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eopd_kernels import LMHead, Objective, Sampled, TopK, TopKTeacher, entropy_aware_kl, reference
from eopd_kernels.inputs.top_k_teacher import entropy_lower_bound, present_entries

INF = math.inf


@pytest.mark.parametrize(
    ("ids", "log_probs", "valid", "present"),
    [
        ([4, 7, 2], [-1.0, -2.0, -3.0], None, [1, 1, 1]),
        ([4, -1, 2], [-1.0, -2.0, -INF], None, [1, 0, 0]),
        ([4, 7, 2], [-1.0, -2.0, -3.0], [True, False, True], [1, 0, 1]),
        ([4, 7, 4], [-1.0, -2.0, -1.0], None, [1, 1, 0]),  # vLLM adds the sampled token to the top k once more
        ([7, 4, 4], [-1.0, -INF, -3.0], None, [1, 0, 1]),  # a missing entry does not shadow its double
        ([-1, -1, -1], [-1.0, -2.0, -3.0], None, [0, 0, 0]),
        ([4, 7, 4], [-1.0, -2.0, -1.5], [False, True, True], [0, 1, 1]),
    ],
)
def test_which_entries_count(ids: Any, log_probs: Any, valid: Any, present: Any) -> None:
    of = present_entries(
        torch.tensor([ids]), torch.tensor([log_probs]), None if valid is None else torch.tensor([valid])
    )
    assert of.tolist() == [[bool(p) for p in present]]


def test_the_lower_bound() -> None:
    q = torch.tensor([[0.5, 0.2], [0.6, 0.4], [1.0, 0.5]], dtype=torch.float64)
    present = torch.tensor([[True, True], [True, True], [True, False]])
    bound = entropy_lower_bound(q.log(), present)
    expected = [-0.5 * math.log(0.5) - 0.2 * math.log(0.2) - 0.3 * math.log(0.3), 0.6730116670092565, 0.0]
    torch.testing.assert_close(bound, torch.tensor(expected, dtype=torch.float64))


def test_a_repeated_or_missing_entry_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 50, generator=generator).requires_grad_()
    ids = torch.stack([torch.randperm(50, generator=generator)[:5] for _ in range(3)])
    log_probs = torch.log_softmax(torch.randn(3, 9, generator=generator), 1)[:, :5]
    objective = Objective(reverse="none", forward="top_k", gate="always")
    plain = entropy_aware_kl(student, TopKTeacher(ids, log_probs), objective=objective)
    longer = TopKTeacher(
        torch.cat([ids, ids[:, 2:3], torch.full((3, 1), -1), ids[:, :1] + 100], 1),
        torch.cat([log_probs, log_probs[:, 2:3], log_probs[:, :1], torch.full((3, 1), -INF)], 1),
    )
    for teacher in (longer, TopKTeacher(longer.ids.int(), longer.log_probs.double())):
        out = entropy_aware_kl(student, teacher, objective=objective)
        torch.testing.assert_close(out.loss, plain.loss)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, student)[0], torch.autograd.grad(plain.loss, student, retain_graph=True)[0]
        )


def test_a_token_without_any_entry_is_nothing() -> None:
    student = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = TopKTeacher(torch.tensor([[3, 4], [-1, -1]]), torch.tensor([[-0.5, -1.0], [-INF, -INF]]))
    for forward in (TopK(), TopK(teacher="raw"), TopK(student="renormalized"), TopK(teacher="raw", tail=True)):
        out = entropy_aware_kl(student, teacher, objective=Objective(reverse="none", forward=forward, gate="always"))
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert out.loss.isfinite() and (gradient[1] == 0).all() and gradient[0].abs().max() > 0


S = torch.zeros(2, 3, 20)
IDS, LOG_PROBS = torch.zeros(2, 3, 4, dtype=torch.long), torch.full((2, 3, 4), -2.0)
T = TopKTeacher(IDS, LOG_PROBS)
TOP = Objective(reverse="none", forward="top_k")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: TopKTeacher(LOG_PROBS, LOG_PROBS),
            TypeError,
            "TopKTeacher.ids must be an integer tensor, got a float32",
        ),
        (lambda: TopKTeacher(None, LOG_PROBS), TypeError, "TopKTeacher.ids must be an integer tensor, got None"),  # type: ignore[arg-type]
        (lambda: TopKTeacher(IDS[..., :0], LOG_PROBS), ValueError, "with k >= 1, got (2, 3, 0)"),
        (lambda: TopKTeacher(IDS, IDS), TypeError, "TopKTeacher.log_probs must be a floating-point tensor"),
        (lambda: TopKTeacher(IDS, LOG_PROBS[0]), ValueError, "TopKTeacher.log_probs must have the shape (2, 3, 4)"),
        (lambda: TopKTeacher(IDS, LOG_PROBS, LOG_PROBS), ValueError, "TopKTeacher.entropy must have the shape (2, 3)"),
        (lambda: TopKTeacher(IDS, LOG_PROBS, valid=IDS), TypeError, "TopKTeacher.valid must be a bool tensor"),
        (lambda: TopKTeacher(IDS, LOG_PROBS, valid=IDS[0] > 0), ValueError, "TopKTeacher.valid must have the shape"),
        (
            lambda: TopKTeacher(IDS, LOG_PROBS, token_log_probs=LOG_PROBS),
            ValueError,
            "TopKTeacher.token_log_probs must have the shape (2, 3)",
        ),
        (
            lambda: entropy_aware_kl(S, T),
            ValueError,
            "Objective.reverse must be 'sampled', a TopK or 'none' with a TopKTeacher",
        ),
        (
            lambda: entropy_aware_kl(S, T, objective=Objective(reverse="none")),
            ValueError,
            "Objective.forward must be 'top_k', a TopK or 'none' with a TopKTeacher",
        ),
        (
            lambda: entropy_aware_kl(S, T, objective=TOP, teacher_head=LMHead(torch.zeros(4, 3))),
            ValueError,
            "teacher_head must be None with a TopKTeacher",
        ),
        (
            lambda: entropy_aware_kl(S, T, objective=Objective(reverse="none", forward="top_k", temperature=2.0)),
            ValueError,
            "Objective.temperature must be 1 for the teacher with a TopKTeacher",
        ),
        (
            lambda: entropy_aware_kl(S, T, objective=Objective.on_policy_distillation()),
            ValueError,
            "needs its token_log_probs, or advantages=, got None",
        ),
        (
            lambda: entropy_aware_kl(S[:1], T, objective=TOP),
            ValueError,
            "same leading shape, got student (1, 3, 20) and teacher (2, 3, 4)",
        ),
        (
            lambda: entropy_aware_kl(S, TopKTeacher(IDS + 20, LOG_PROBS), objective=TOP),
            ValueError,
            "TopKTeacher.ids must be in [0, 20) where they count, got 20",
        ),
        (
            lambda: entropy_aware_kl(S, TopKTeacher(IDS + 15, LOG_PROBS), objective=TOP, vocab_size=15),
            ValueError,
            "TopKTeacher.ids must be in [0, 15) where they count, got 15",
        ),
        (
            lambda: entropy_aware_kl(S, TopKTeacher(IDS, LOG_PROBS.clone().requires_grad_()), objective=TOP),
            ValueError,
            "teacher.log_probs requires grad",
        ),
        (
            lambda: entropy_aware_kl(S, TopKTeacher(IDS.to("meta"), LOG_PROBS), objective=TOP),
            ValueError,
            "all tensors must be on one device, got student on cpu and teacher.ids on meta",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)


def test_ids_that_do_not_count_may_be_anything() -> None:
    ids = IDS.clone()
    ids[0] = 1000
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    out = entropy_aware_kl(S, TopKTeacher(ids, LOG_PROBS), objective=TOP, mask=mask)
    assert out.loss.isfinite()
    objective = Objective(reverse=Sampled(), forward="none")
    teacher = TopKTeacher(IDS, LOG_PROBS, token_log_probs=torch.full((2, 3), -1.0))
    token_ids = torch.where(mask == 0, -100, 3)
    old = torch.where(mask == 0, torch.nan, -1.0)
    out = entropy_aware_kl(S, teacher, objective=objective, mask=mask, token_ids=token_ids, old_log_probs=old)
    assert out.loss.isfinite()


def test_beside_large_logits_nothing_overflows(backend: str) -> None:
    """The student's block stands in for the teacher's: exp(z − m_t) is to stay finite, for all that it counts for 0."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0.0, 60.0, 95.0, 120.0]).unsqueeze(1)
    student = (5 * torch.randn(4, 64, generator=generator) + offsets).requires_grad_()
    teacher = TopKTeacher(torch.tensor([[1, 2, 3]] * 4), torch.full((4, 3), -2.0))
    objective = Objective("always", reverse="none", forward="top_k")
    loss = entropy_aware_kl(student, teacher, objective=objective, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    truth = reference.entropy_aware_kl(exact, teacher, objective=objective).loss
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(truth, exact)[0], rtol=1e-4, atol=1e-6)
