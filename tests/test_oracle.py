"""Three parties: the truth in fp64, the definitions in plain torch on the same inputs, and the kernels.

A kernel may not be further from the truth than a small multiple of what plain torch is, plus a few roundings. The plain
party holds 16-bit inputs' logits in fp32, which is stricter than what people write by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopd_kernels import EntropyGate, entropy_aware_kl, reference
from eopd_kernels.loss import EntropyAwareKLOutput
from tests.conftest import Case, interpreted, logits_like, make_case, relative_error, size, skip_unless, upstream_for

FIGURES = ("loss", "teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "reverse_half", "forward_half")
SIDES = [("logits", "logits"), ("hidden", "hidden"), ("hidden", "logits"), ("logits", "hidden")]
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def solve(function: Any, case: Case, **options: Any) -> tuple[EntropyAwareKLOutput, list[Tensor]]:
    """The output and the gradients of all leaves under an upstream gradient that is not 1."""
    out = function(case.student, case.teacher, **case.arguments, **options)
    return out, list(torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss)))


def assert_no_worse_than_plain(case: Case, reduction: str = "mean", **options: Any) -> None:
    """Holds the kernels' output and gradients against the two other parties."""
    truth, true_gradients = solve(reference.entropy_aware_kl, case.to(torch.float64), reduction=reduction)
    plain, plain_gradients = solve(reference.entropy_aware_kl, case, reduction=reduction)
    ours, gradients = solve(entropy_aware_kl, case, reduction=reduction, **options)
    dtype = case.student.dtype
    # In fp64 the truth is no more exact than the other two, so the roundings allowed have to cover all three.
    inside = 2**-48 if dtype == torch.float64 else 2**-24
    if ((truth.gate == 0) | (truth.gate == 1)).all():
        assert torch.equal(ours.gate.double(), truth.gate)
    of_token = () if truth.student_log_probs is None else ("student_log_probs", "teacher_log_probs")
    for name in ("gate", *FIGURES, *of_token):
        value, of_plain, exact = (getattr(party, name) for party in (ours, plain, truth))
        unknown = value.isnan()
        assert (truth.gate[unknown & ~exact.isnan()] == 0).all(), f"{name} is NaN on tokens that were visited"
        value, of_plain, exact = value[~unknown], of_plain[~unknown], exact[~unknown]
        assert exact.isfinite().all() and of_plain.isfinite().all(), "there is nothing to compare with"
        bound = 4 * relative_error(of_plain, exact) + 16 * inside
        assert relative_error(value, exact) <= bound, f"{name}: {relative_error(value, exact)} > {bound}"
    for leaf, value, of_plain, exact in zip(case.leaves, gradients, plain_gradients, true_gradients, strict=True):
        assert exact.isfinite().all() and of_plain.isfinite().all(), "there is nothing to compare with"
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        bound = 4 * relative_error(of_plain, exact) + 16 * inside + 2 * ROUNDING[dtype]
        assert relative_error(value, exact) <= bound, f"{tuple(leaf.shape)}: {relative_error(value, exact)} > {bound}"


def test_the_cases_have_open_and_closed_gates() -> None:
    for student, teacher in SIDES:
        case = make_case(student=student, teacher=teacher)
        gate = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).gate
        assert 0.1 < gate.mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize(("student", "teacher"), SIDES)
def test_no_worse_than_plain_torch(student: str, teacher: str, schedule: str, dtype: torch.dtype, backend: str) -> None:
    skip_unless(dtype in (torch.float32, torch.bfloat16) or schedule == "chunked", backend)
    bias, masked = student == "hidden", teacher == "hidden"
    case = make_case(student=student, teacher=teacher, dtype=dtype, bias=bias, masked=masked, **size(backend))
    assert_no_worse_than_plain(case, schedule=schedule, backend=backend, workspace_bytes=1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_every_reduction(student: str, reduction: str, backend: str) -> None:
    assert_no_worse_than_plain(make_case(student=student, masked=True, **size(backend)), reduction, backend=backend)


@pytest.mark.parametrize("combine", ["add", "switch"])
@pytest.mark.parametrize("gate", [EntropyGate(1.5), "always", "never"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_every_objective(combine: str, gate: Any, temperature: float, backend: str) -> None:
    skip_unless(temperature != 0.7 or gate == "always", backend)
    options = {"combine": combine, "gate": gate, "temperature": temperature, **size(backend)}
    case = make_case(student="logits", teacher="logits", **options)
    for schedule in ("chunked", "recompute"):
        assert_no_worse_than_plain(case, schedule=schedule, backend=backend)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_scale_and_softcap_of_each_side(schedule: str, backend: str) -> None:
    case = make_case(bias=True, **size(backend))
    assert case.student_head is not None and case.teacher_head is not None
    case.student_head.softcap, case.student_head.scale = 7.0, 0.6
    case.teacher_head.softcap, case.teacher_head.scale = 11.0, 1.4
    assert_no_worse_than_plain(case, schedule=schedule, backend=backend, workspace_bytes=1)


@given(
    seed=st.integers(0, 2**16),
    leading=st.sampled_from([(1,), (5,), (70,), (2, 35), (2, 3, 7)]),
    vocab_size=st.sampled_from([1, 2, 3, 15, 16, 17, 100, 1023, 1025, 2500]),
    sides=st.sampled_from(SIDES),
    dtypes=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    teacher_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    schedule=st.sampled_from(["chunked", "recompute"]),
    workspace_bytes=st.sampled_from([1, 2**16, 2**18, None]),
)
def test_random_problems(
    seed: int,
    leading: tuple[int, ...],
    vocab_size: int,
    sides: tuple[str, str],
    dtypes: torch.dtype,
    teacher_dtype: torch.dtype,
    masked: bool,
    schedule: str,
    workspace_bytes: int | None,
) -> None:
    case = make_case(
        seed, leading=leading, vocab_size=vocab_size, student=sides[0], teacher=sides[1], dtype=dtypes, masked=masked
    )
    if case.teacher_head is None:
        case = Case(case.student, case.teacher.to(teacher_dtype), **case.arguments)
    assert_no_worse_than_plain(case, schedule=schedule, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_small_divergence_of_shifted_logits(shift: float, backend: str) -> None:
    """Near the teacher, where distillation ends: KL about 2e-4, below what rounded logits can resolve."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 5_000) if interpreted(backend) else (16, 20_000)
    teacher = logits_like(generator, *shape) + shift
    student = (teacher + 0.02 * torch.randn(shape, generator=generator)).requires_grad_()
    case = Case(student, teacher)
    truth, (true_gradient,) = solve(reference.entropy_aware_kl, case.to(torch.float64), reduction="sum")
    assert 1e-4 < truth.forward_kl.mean() < 4e-4 and 1e-4 < truth.reverse_kl.mean() < 4e-4
    for schedule in ("chunked", "recompute"):
        ours, (gradient,) = solve(entropy_aware_kl, case, reduction="sum", schedule=schedule, backend=backend)
        for name in ("forward_kl", "reverse_kl"):
            error = (getattr(ours, name) - getattr(truth, name)).abs() / getattr(truth, name)
            assert error.max() < 0.01, f"{name}: {float(error.max())}"
        assert relative_error(gradient, true_gradient) < 1e-3
