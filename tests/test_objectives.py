"""Every objective, on every backend and schedule, against the reference: values and gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopd_kernels import (
    EntropyGate,
    Objective,
    QuantileGate,
    RowStatistics,
    Sampled,
    Skewed,
    TopK,
    entropy_aware_kl,
    reference,
)
from tests.conftest import Case, make_case, relative_error, size, skip_unless
from tests.test_oracle import assert_no_worse_than_plain

REVERSES = [
    "full",
    Sampled(),
    Sampled(0.1, 0.4),
    Sampled(0.1, 0.4, clip_most=1.5),
    TopK(6, teacher="raw"),
    TopK(5, student="renormalized", of="student"),
    TopK(7, teacher="raw", tail=True, of="student"),
    Skewed(0.3),
    "none",
]
FORWARDS = [
    "full",
    TopK(5),
    TopK(5, teacher="raw"),
    TopK(5, student="renormalized"),
    TopK(5, teacher="raw", student="renormalized"),
    TopK(5, teacher="raw", tail=True),
    TopK(4, teacher="raw", of="student"),
    Skewed(0.2),
    "none",
]
TELLING_HALVES = [
    (Sampled(), TopK(5)),
    ("full", TopK(5, teacher="raw", tail=True)),
    (Skewed(0.3), Skewed(0.2)),
    (Skewed(0.3), TopK(5)),
    (TopK(7, teacher="raw", tail=True, of="student"), TopK(5)),
    ("none", Skewed(0.2)),
]
HALVES = [pair for pair in itertools.product(REVERSES, FORWARDS) if pair != ("none", "none")]


def confident(statistics: RowStatistics) -> Tensor:
    """A user's own gate: where the teacher is surer than the student, by how much, looking across the batch."""
    lead = statistics.student_entropy - statistics.teacher_entropy
    return torch.nan_to_num((lead / lead.abs().nanmean()).clamp(0, 1))


GATES = [
    EntropyGate(2.0),
    EntropyGate(2.0, of="student"),
    EntropyGate(0.4, normalized=True),
    EntropyGate(2.0, sharpness=1.5),
    EntropyGate(0.4, normalized=True, sharpness=9.0),
    QuantileGate(0.6),
    QuantileGate(0.3, of="student"),
    "always",
    "never",
    confident,
]


def case_of(objective: Objective, *, seed: int = 0, given: tuple[str, ...] = (), **options: Any) -> Case:
    """A problem with everything per token that the objective needs, and what else is asked for."""
    case = replace(make_case(seed, **options), objective=objective)
    generator = torch.Generator().manual_seed(seed + 1)
    leading = case.student.shape[:-1]
    vocab_size = case.student.shape[-1] if case.student_head is None else len(case.student_head.weight)
    per_token: dict[str, Tensor] = {}
    if isinstance(objective.reverse, Sampled):
        logits = reference.transformed_logits(case.student.double(), case.student_head, vocab_size, 1.0).detach()
        log_p = torch.log_softmax(logits / objective.temperatures[0], 1)
        y = torch.multinomial(log_p.exp(), 1, generator=generator)
        noise = 0.3 * torch.randn(len(y), 1, generator=generator)
        per_token["token_ids"] = y.view(leading)
        per_token["old_log_probs"] = (log_p.gather(1, y) + noise).clamp(max=0).view(leading).float()
        if case.mask is not None:
            per_token["token_ids"].masked_fill_(~case.mask, -100)
            per_token["old_log_probs"].masked_fill_(~case.mask, torch.nan)
    if "token_ids" in given or objective.cross_entropy != 0:
        y = torch.randint(vocab_size, leading, generator=generator)
        per_token.setdefault("token_ids", y if case.mask is None else y.masked_fill(~case.mask, -100))
    if "advantages" in given and isinstance(objective.reverse, Sampled):
        per_token["advantages"] = 3 * torch.randn(leading, generator=generator)
        if case.mask is not None:
            per_token["advantages"].masked_fill_(~case.mask, torch.nan)
    for name in given:
        if name in ("token_ids", "advantages"):
            continue
        per_token[name] = torch.rand(leading, generator=generator).clamp(0.2, 0.9).sub(0.2)
    return replace(case, per_token=per_token)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize(("reverse", "forward"), HALVES, ids=str)
def test_every_pair_of_halves(reverse: Any, forward: Any, schedule: str, backend: str) -> None:
    skip_unless((reverse, forward) in TELLING_HALVES, backend)
    objective = Objective(gate=EntropyGate(2.0), alpha=0.7, reverse=reverse, forward=forward)
    case = case_of(objective, masked=True, **size(backend))
    assert_no_worse_than_plain(case, schedule=schedule, backend=backend, workspace_bytes=1)


@pytest.mark.parametrize("combine", ["add", "switch", "blend"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
def test_every_gate(gate: Any, combine: str, backend: str) -> None:
    skip_unless(combine == "blend" and gate in (EntropyGate(2.0), QuantileGate(0.6)), backend)
    objective = Objective(gate=gate, alpha=0.7, combine=combine)  # type: ignore[arg-type]
    for student in ("logits", "hidden"):
        case = case_of(objective, student=student, teacher="logits", masked=True, **size(backend))
        assert_no_worse_than_plain(case, backend=backend)


SIDES = st.sampled_from(["logits", "hidden"])


@given(
    seed=st.integers(0, 2**16),
    leading=st.sampled_from([(33,), (40,), (2, 35)]),
    vocab_size=st.sampled_from([17, 130, 1025, 2500]),
    student=SIDES,
    teacher=SIDES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    gate=st.sampled_from(GATES),
    halves=st.sampled_from(HALVES),
    combine=st.sampled_from(["add", "switch", "blend"]),
    temperature=st.sampled_from([1.0, 0.7, (2.0, 1.3)]),
    given=st.sampled_from([(), ("gate", "token_ids"), ("reverse_weights",), ("forward_weights", "reverse_weights")]),
    sampled=st.booleans(),
    advantages=st.booleans(),
    cross_entropy=st.sampled_from([0.0, 0.0, 0.6]),
    masked=st.booleans(),
    schedule=st.sampled_from(["auto", "recompute"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    workspace_bytes=st.sampled_from([1, 2**18, None]),
)
def test_any_options_together(
    seed: int,
    leading: tuple[int, ...],
    vocab_size: int,
    student: str,
    teacher: str,
    dtype: torch.dtype,
    gate: Any,
    halves: tuple[Any, Any],
    combine: Any,
    temperature: Any,
    given: tuple[str, ...],
    sampled: bool,
    advantages: bool,
    cross_entropy: float,
    masked: bool,
    schedule: str,
    reduction: str,
    workspace_bytes: int | None,
) -> None:
    objective = Objective(gate, 0.7, combine, temperature, *halves, reverse_weight=1.5)
    if temperature == 1:
        objective = replace(objective, cross_entropy=cross_entropy)
    options: dict[str, Any] = {"leading": leading, "vocab_size": vocab_size, "dtype": dtype}
    options |= {"student": student, "teacher": teacher}
    given = (*given, *["token_ids"] * sampled, *["advantages"] * advantages)
    case = case_of(objective, seed=seed, given=given, masked=masked, **options)
    # Among logits of 16 bits the k-th likeliest is seldom one: which of several is taken is not stated.
    untied = make_case(seed, **{**options, "dtype": torch.float32})
    if case.teacher_head is None and "teacher" in objective.top_k:
        case = replace(case, teacher=untied.teacher)
    if case.student_head is None and "student" in objective.top_k:
        case = replace(case, student=untied.student)
    assert_no_worse_than_plain(case, reduction, schedule=schedule, workspace_bytes=workspace_bytes)


def loss_and_gradient(objective: Objective, case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of every token and the gradient of the student's logits, which the case has."""
    out = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "objective": objective}, **options)
    (gradient,) = torch.autograd.grad(out.loss, case.student)
    return out.loss.detach(), gradient


@pytest.fixture
def logits() -> Case:
    return make_case(student="logits", teacher="logits", dtype=torch.float64, leading=(30,), vocab_size=211)


def same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    assert relative_error(one[0], two[0]) < tolerance and relative_error(one[1], two[1]) < tolerance


def test_identities(logits: Case) -> None:
    def of(objective: Objective) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(objective, logits)

    same(of(Objective(gate="always", combine="switch")), of(Objective.forward_kl()))
    same(of(Objective(gate="always", combine="blend")), of(Objective.forward_kl()))
    same(of(Objective(gate="never", combine="switch")), of(Objective.reverse_kl()))
    same(of(Objective(gate=EntropyGate(2.0), combine="blend")), of(Objective(gate=EntropyGate(2.0), combine="switch")))
    for teacher, student, tail in (
        ("renormalized", "full", False),
        ("raw", "full", True),
        ("raw", "renormalized", False),
    ):
        whole = TopK(211, teacher=teacher, student=student, tail=tail)  # type: ignore[arg-type]
        same(of(Objective(gate="always", reverse="none", forward=whole)), of(Objective.forward_kl()))
    for of_side, student, tail in itertools.product(("teacher", "student"), ("full", "renormalized"), (False, True)):
        if student == "full" or not tail:
            whole = TopK(211, teacher="raw", student=student, tail=tail, of=of_side)  # type: ignore[arg-type]
            same(of(Objective(gate="never", reverse=whole, forward="none")), of(Objective.reverse_kl()))
    same(of(Objective(gate="always", reverse=Skewed(0.0), forward=Skewed(0.0))), of(Objective.jeffreys()))
    same(of(Objective.gkd(0.0)), of(Objective.forward_kl()))
    same(of(Objective.gkd(1.0)), of(Objective.reverse_kl()))
    same(of(Objective(gate=EntropyGate(2.0, sharpness=1e6))), of(Objective(gate=EntropyGate(2.0))), 1e-6)
    same(of(Objective(gate=EntropyGate(0.4, normalized=True))), of(Objective(gate=EntropyGate(0.4 * 5.351858133))))
    squared = of(Objective(temperature=2.0, temperature_squared=True))
    plain = of(Objective(temperature=2.0))
    same(squared, (4 * plain[0], 4 * plain[1]))
    same(of(Objective(temperature=(2.0, 2.0))), plain)


def test_blended_weights_add_up_to_one(logits: Case) -> None:
    """L = (1 − αg)·R + αg·F lies between the halves on every token."""
    objective = Objective(gate=EntropyGate(2.0, sharpness=2.0), alpha=0.8, combine="blend")
    out = entropy_aware_kl(
        logits.student, logits.teacher, **{**logits.arguments, "objective": objective}, reduction="none"
    )
    low, high = torch.minimum(out.reverse_kl, out.forward_kl), torch.maximum(out.reverse_kl, out.forward_kl)
    assert ((out.loss >= low) & (out.loss <= high)).all()
    expected = out.reverse_kl + 0.8 * out.gate * (out.forward_kl - out.reverse_kl)
    torch.testing.assert_close(out.loss.detach(), expected)


def test_the_ends_of_the_jsd(logits: Case) -> None:
    tiny = 1e-6
    forward, reverse = (loss_and_gradient(o, logits) for o in (Objective.forward_kl(), Objective.reverse_kl()))
    low, high = loss_and_gradient(Objective.jsd(tiny), logits), loss_and_gradient(Objective.jsd(1 - tiny), logits)
    same((low[0] / tiny, low[1] / tiny), forward, 1e-3)
    same((high[0] / tiny, high[1] / tiny), reverse, 1e-3)
    half = loss_and_gradient(Objective.jsd(0.5), logits)[0]
    exchanged = replace(logits, student=logits.teacher.clone().requires_grad_(), teacher=logits.student.detach())
    assert abs(half - loss_and_gradient(Objective.jsd(0.5), exchanged)[0]) < 1e-12
    assert 0 < half < 0.6931471806


@pytest.mark.parametrize("half", ["forward", "reverse"])
@pytest.mark.parametrize("tail", [False, True])
def test_the_tail_bucket_is_a_divergence(tail: bool, half: str) -> None:
    """Never negative, and nothing at the teacher; a raw top k without it is negative somewhere."""
    top = TopK(3, teacher="raw", tail=tail)
    objective = Objective(gate="always", **{"reverse": "none", "forward": "none", half: top})  # type: ignore[arg-type]
    values = []
    for noise in (0.0, 1e-6, 1e-5, 1e-4, 1e-2, 1.0):
        generator = torch.Generator().manual_seed(4)
        teacher = 3 * torch.randn(2000, 211, generator=generator)
        student = teacher + noise * torch.randn(teacher.shape, generator=generator)
        out = entropy_aware_kl(student.requires_grad_(), teacher, objective=objective)
        values.append(getattr(out, f"{half}_half"))
        if noise == 0:
            (gradient,) = torch.autograd.grad(out.loss, student)
            zero = bool(values[-1].max() < 1e-6 and gradient.abs().max() < 1e-7)
            assert zero or not tail
    assert (torch.cat(values).min() >= 0) == tail


def test_the_sampled_half_averages_to_the_full_gradient(logits: Case) -> None:
    """Over y ~ p = p_old: Σ_y p(y)·(gradient at y) is the gradient of the full reverse KL."""
    log_p = torch.log_softmax(logits.student.detach(), 1)
    (exact,) = torch.autograd.grad(
        entropy_aware_kl(logits.student, logits.teacher, objective=Objective.reverse_kl()).loss, logits.student
    )
    total = torch.zeros_like(exact)
    for y in range(211):
        ids = torch.full((30,), y)
        out = entropy_aware_kl(
            logits.student,
            logits.teacher,
            objective=Objective.on_policy_distillation(),
            token_ids=ids,
            old_log_probs=log_p[:, y],
        )
        (gradient,) = torch.autograd.grad(out.loss, logits.student)
        total += log_p[:, y : y + 1].exp() * gradient
    assert relative_error(total, exact) < 1e-10


@pytest.mark.parametrize(("reverse", "forward"), HALVES, ids=str)
def test_gradients_of_a_row_sum_to_zero(reverse: Any, forward: Any) -> None:
    """A shift of all logits changes nothing."""
    objective = Objective(gate=EntropyGate(2.0), reverse=reverse, forward=forward)
    case = case_of(objective, student="logits", teacher="logits", dtype=torch.float64)
    _, gradient = loss_and_gradient(objective, case)
    assert gradient.abs().max() > 0
    assert gradient.sum(-1).abs().max() < 1e-12 * gradient.abs().sum(-1).max()


@pytest.mark.parametrize(("reverse", "forward"), HALVES, ids=str)
def test_finite_differences(reverse: Any, forward: Any) -> None:
    objective = Objective(gate="always", alpha=0.7, reverse=reverse, forward=forward)
    case = case_of(objective, student="logits", teacher="logits", leading=(3,), vocab_size=11, dtype=torch.float64)

    def loss(student: Tensor) -> Tensor:
        return entropy_aware_kl(student, case.teacher, **case.arguments).loss

    assert torch.autograd.gradcheck(loss, (case.student,))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_heads_with_transforms(schedule: str, backend: str) -> None:
    """A negative scale turns the teacher's order round: its top k are the smallest products."""
    skip_unless(schedule == "chunked", backend)
    halves: list[Any] = [
        (Sampled(), TopK(5)),
        ("none", TopK(5, teacher="raw", tail=True)),
        (Skewed(0.2), TopK(5)),
        (TopK(6, teacher="raw", of="student"), "none"),
    ]
    for reverse, forward in halves:
        objective = Objective(gate=EntropyGate(1.0), reverse=reverse, forward=forward, temperature=(1.3, 0.8))
        case = make_case(masked=True, bias=True, **size(backend))
        assert case.student_head is not None and case.teacher_head is not None
        turned = -1.0 if "student" in objective.top_k else 1.0
        case.student_head.softcap, case.student_head.scale = 7.0, 0.6 * turned
        case.teacher_head.softcap, case.teacher_head.scale = 11.0, -1.4
        case = replace(case, objective=objective)
        given = case_of(objective, masked=True, bias=True, **size(backend)).per_token
        assert_no_worse_than_plain(
            replace(case, per_token=given), schedule=schedule, backend=backend, workspace_bytes=1
        )


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
def test_every_gate_without_a_reverse_half(gate: Any, schedule: str) -> None:
    """Tokens whose gate is shut are not visited: what is known of the others must not depend on that."""
    schedule = "auto" if schedule == "chunked" else schedule
    for forward in ("full", TopK(5), Skewed(0.2)):
        objective = Objective(gate=gate, alpha=0.7, reverse="none", forward=forward)
        assert_no_worse_than_plain(case_of(objective, masked=True), schedule=schedule)
