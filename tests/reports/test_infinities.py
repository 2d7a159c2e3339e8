"""Columns and rows without mass, and 0 · ∞."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eopd_kernels import LMHead, Objective, TopK, TopKTeacher, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved

INF = math.inf


@pytest.mark.parametrize(
    ("logits", "dtype", "entropy"),
    [
        ([0.0, -INF], torch.float32, 0.0),
        ([0.0, 0.0, -INF], torch.float32, math.log(2)),
        ([65504.0, -65504.0], torch.float16, 0.0),
    ],
)
def test_an_entry_without_mass_has_no_entropy(logits: list[float], dtype: torch.dtype, entropy: float) -> None:
    """huggingface/trl#7221: p · log p = 0 · −∞ = NaN in the entropy that is logged; NovaSky-AI/SkyRL#2259 in one over
    a spread vocabulary."""
    tensor = torch.tensor([logits], dtype=dtype)
    out = entropy_aware_kl(tensor, tensor)
    assert abs(float(out.teacher_entropy) - entropy) < 1e-6 and abs(float(out.student_entropy) - entropy) < 1e-6


@pytest.mark.parametrize(
    "objective", [Objective.jeffreys(), Objective.jsd(0.3), Objective.skewed_forward_kl()], ids=str
)
def test_entries_that_both_models_suppress(objective: Objective, backend: str) -> None:
    """p-e-w/heretic#348: two suppressed tokens, −∞ in both models, made every KL NaN."""
    student, teacher = normal(4, 33, seed=1), normal(4, 33, seed=2)
    kept = [c for c in range(33) if c not in (5, 32)]
    options: dict[str, Any] = {"objective": objective, "backend": backend}
    expected, of_kept = solved(student[:, kept].contiguous(), teacher[:, kept].contiguous(), **options)
    for logits in (student, teacher):
        logits[:, [5, 32]] = -INF
    loss, ours = solved(student, teacher, **options)
    close(loss, expected)
    close(ours[:, kept], of_kept)
    assert not ours[:, [5, 32]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_without_mass_has_a_finite_gradient(dtype: torch.dtype, backend: str) -> None:
    """google-deepmind/optax#1786: where the target is 0 the value was guarded and the gradient NaN."""
    student, teacher = normal(3, 20, seed=1).to(dtype), normal(3, 20, seed=2).to(dtype)
    teacher[:, ::4] = -INF
    loss, ours = solved(student, teacher, objective=Objective.forward_kl(), backend=backend)
    leaf = student.double().requires_grad_()
    truth = plain(leaf, teacher).forward_kl.mean()
    close(loss, truth)
    close(ours, gradient(truth, leaf), 1e-5 if dtype == torch.float32 else 2**-8)


def test_a_half_of_weight_0_that_is_infinite() -> None:
    """google-deepmind/optax#1786: 0 · ∞, here the reverse KL to a teacher that excludes what the student says, in an
    objective that does not have it."""
    student, teacher = normal(3, 20, seed=1), normal(3, 20, seed=2)
    teacher[:, 7] = -INF
    leaf = student.clone().requires_grad_()
    out = entropy_aware_kl(leaf, teacher, objective=Objective(reverse_weight=0.0, gate="always"))
    assert (out.reverse_kl == INF).all()
    close(out.loss, plain(student, teacher).forward_kl.mean())
    assert torch.autograd.grad(out.loss, leaf)[0].isfinite().all()


def test_padding_of_a_served_teacher() -> None:
    """huggingface/trl#5594: shorter samples were padded with −∞, which nan_to_num repaired in the loss and not in its
    gradient."""
    ids = torch.randint(0, 40, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    log_probs = torch.log_softmax(normal(2, 5, 4, seed=1), -1) - 0.1
    log_probs[1, 3:] = -INF
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    objective = Objective(gate="always", reverse="none", forward=TopK(teacher="raw", tail=True))
    student = normal(2, 5, 40, seed=2)
    loss, ours = solved(student, TopKTeacher(ids, log_probs), mask=mask, objective=objective)
    first, _ = solved(student[0], TopKTeacher(ids[0], log_probs[0]), objective=objective, reduction="sum")
    second, _ = solved(student[1, :3], TopKTeacher(ids[1, :3], log_probs[1, :3]), objective=objective, reduction="sum")
    close(loss, (first + second) / 8)
    assert ours.isfinite().all() and not ours[1, 3:].any() and ours[1, :3].any()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_nan_at_a_masked_position_stays_there(schedule: str) -> None:
    """ecmwf/WeatherGenerator#2723: masked by multiplication, NaN · 0 = NaN; pytorch/pytorch#121416 is the same in the
    gradient. Here in hidden states, from where it could reach the head's gradient."""
    hidden, teacher = normal(2, 6, 8), normal(2, 6, 31, seed=1)
    hidden[0, 2], teacher[1, 4] = math.nan, math.nan
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = False
    weight = normal(31, 8, seed=2).requires_grad_()
    leaf = hidden.clone().requires_grad_()
    loss = entropy_aware_kl(
        leaf, teacher, student_head=LMHead(weight), mask=mask, schedule=schedule, objective=Objective.jeffreys()
    ).loss
    exact = weight.detach().double().requires_grad_()
    kls = plain(hidden[mask].double() @ exact.t(), teacher[mask])
    truth = (kls.forward_kl + kls.reverse_kl).mean()
    close(loss, truth)
    of_hidden, of_weight = torch.autograd.grad(loss, (leaf, weight))
    close(of_weight, torch.autograd.grad(truth, exact)[0])
    assert of_hidden.isfinite().all() and not of_hidden[~mask].any()


def test_a_row_without_any_mass_is_only_its_own_trouble() -> None:
    """linkedin/Liger-Kernel#769: NaN from −∞ and from what is masked; masked it is nothing, and it reaches no other
    row."""
    student, teacher = normal(4, 12), normal(4, 12, seed=1)
    student[2] = teacher[2] = -INF
    mask = torch.tensor([1, 1, 0, 1])
    loss, ours = solved(student, teacher, mask=mask, objective=Objective.jeffreys())
    kept = [0, 1, 3]
    kls = plain(student[kept], teacher[kept])
    close(loss, (kls.forward_kl + kls.reverse_kl).mean())
    assert not ours[2].any() and ours[kept].isfinite().all()
    out = entropy_aware_kl(student, teacher, reduction="none")
    assert out.loss[kept].isfinite().all()


def test_a_missing_log_probability_is_no_probability_of_1() -> None:
    """pytorch/rl#4255: scores that a server had not given were filled with 0, which is log 1."""
    ids = torch.tensor([[3, 8, -1, -1]])
    log_probs = torch.tensor([[-0.5, -1.5, 0.0, 0.0]])
    objective = Objective(gate="always", reverse="none", forward=TopK(teacher="raw"))
    student = normal(1, 20)
    loss, _ = solved(student, TopKTeacher(ids, log_probs), objective=objective)
    log_p = torch.log_softmax(student.double(), -1)[0]
    truth = sum(math.exp(lq) * (lq - float(log_p[v])) for v, lq in ((3, -0.5), (8, -1.5)))
    close(loss, torch.tensor(truth))
