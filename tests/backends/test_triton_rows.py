"""What only the Triton backend has to answer for: words beside its tensors, split rows, its tanh, refusals.

The oracle of tests/test_rows.py and tests/test_oracle.py runs on it as on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopd_kernels.backends import triton as backend
from eopd_kernels.row_math.statistics import RowStatistics
from eopd_kernels.rows import FUNCTIONS, implementations
from tests.canaries import Guarded
from tests.conftest import make_case, relative_error
from tests.test_oracle import SIDES, assert_no_worse_than_plain
from tests.test_rows import ADD, DTYPES, IDENTITY, TRANSFORMS, block, random_coefficients

pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
TRITON, TORCH = FUNCTIONS["triton"], FUNCTIONS["torch"]
PYTHON = implementations("triton")  # the dispatcher gives what is partly on meta to the fakes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("vocab_size", "padding"), [(1, 0), (300, 0), (1024, 8), (2049, 3)])
def test_nothing_is_written_beside_a_tensor(
    guarded: Guarded, vocab_size: int, padding: int, rows: int, dtype: torch.dtype
) -> None:
    inputs = block(rows, vocab_size, dtype)
    student, teacher = (guarded.holding(x, padding) for x in inputs)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weights = guarded.holding(torch.tensor([0.3, 0.0, -1.2, 1.0, 2.5][:rows], dtype=compute))
    out = guarded((rows, vocab_size), dtype, padding)
    TRITON.row_loss_and_gradient(student, teacher, weights, 1.0, list(ADD), IDENTITY, out)
    statistics = TRITON.row_statistics(student, teacher, IDENTITY)
    again = guarded((rows, vocab_size), compute, padding)
    a, b, c = (guarded.holding(k) for k in random_coefficients(rows, compute))
    TRITON.row_gradient(student, teacher, statistics, a, b, c, IDENTITY, again)
    TRITON.row_mixture(student, teacher, statistics, [0.1, 0.4], IDENTITY)
    mixed = guarded((rows, vocab_size), dtype, padding)
    TRITON.row_mixture_gradient(student, teacher, statistics, a, b, c, [0.1, 0.4], IDENTITY, mixed)
    assert torch.equal(student, inputs[0]) and torch.equal(teacher, inputs[1])


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab_size", [3, 1024, 5003, 9000])
def test_split_rows_are_the_same_rows(vocab_size: int, transforms: list[float]) -> None:
    """Few rows are split over programs and merged; taken one at a time they must not differ from many."""
    student, teacher = block(5, vocab_size)
    student[0], teacher[0, : vocab_size // 2] = math.nan, -math.inf
    weights = torch.tensor([0.0, -1.2, 1.0, 2.5, 0.7])
    out, split = torch.empty(5, vocab_size), torch.empty(5, vocab_size)
    statistics, gate, loss = TRITON.row_loss_and_gradient(student, teacher, weights, 1.0, list(ADD), transforms, out)
    for row in range(5):
        one = slice(row, row + 1)
        part, part_gate, part_loss = TRITON.row_loss_and_gradient(
            student[one], teacher[one], weights[one], 1.0, list(ADD), transforms, split[one]
        )
        assert torch.equal(part_gate, gate[one])
        if row == 0:
            assert torch.equal(part, RowStatistics.empty(1, torch.float32, part.device).packed)
            assert part_loss == loss[0] == 0 and (split[0] == 0).all() and (out[0] == 0).all()
        else:
            assert relative_error(part, statistics[one]) < 1e-6 and relative_error(part_loss, loss[one]) < 1e-5
            assert relative_error(split[one], out[one]) < 3e-6
            alone = TRITON.row_statistics(student[one], teacher[one], transforms)
            assert torch.equal(alone, part)


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab_size", [3, 1024, 5003, 9000])
def test_split_rows_have_the_same_mixture(vocab_size: int, transforms: list[float]) -> None:
    student, teacher = block(5, vocab_size)
    teacher[0, : vocab_size // 2] = -math.inf
    statistics = TRITON.row_statistics(student, teacher, transforms)
    coefficients, out = random_coefficients(5, torch.float32), torch.empty(5, vocab_size)
    mixture = TRITON.row_mixture(student, teacher, statistics, [0.1, 0.4], transforms)
    TRITON.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.1, 0.4], transforms, out)
    for row in range(5):
        one = slice(row, row + 1)
        sides, numbers = (student[one], teacher[one]), [k[one] for k in coefficients]
        part = TRITON.row_mixture(*sides, statistics[one], [0.1, 0.4], transforms)
        assert relative_error(part, mixture[one]) < 1e-6
        split = torch.empty(1, vocab_size)
        TRITON.row_mixture_gradient(*sides, statistics[one], *numbers, [0.1, 0.4], transforms, split)
        assert torch.equal(split, out[one])


@pytest.mark.parametrize("dead", [slice(0, 4096), slice(1024, 9000), slice(1, 9000)], ids=str)
def test_parts_without_mass(dead: slice) -> None:
    student, teacher = block(1, 9000)
    student[:, dead] = teacher[:, dead] = -math.inf
    packed = TRITON.row_statistics(student, teacher, IDENTITY)
    assert relative_error(packed, TORCH.row_statistics(student, teacher, IDENTITY)) < 1e-5


def test_a_far_part_does_not_outlive_its_mass() -> None:
    """An infinite divergence in columns whose mass is nothing beside the row's is nothing."""
    student, teacher = torch.zeros(4, 3000), torch.zeros(4, 3000)
    teacher[:, :1024] = -200.0
    student[:, :1024] = -math.inf
    statistics = RowStatistics(TRITON.row_statistics(student, teacher, IDENTITY))
    assert (statistics.forward_kl.abs() < 1e-6).all() and (statistics.reverse_kl.abs() < 1e-6).all()


def test_tanh_keeps_its_digits() -> None:
    """Near 0, where a softcap hardly acts and 1 − 2/(e²ˣ + 1) would lose what distinguishes two logits."""
    x = torch.cat([torch.logspace(-6, 1.2, 900), -torch.logspace(-6, 1.2, 100)]).reshape(4, 250)
    softcap = 2.0
    statistics = torch.empty(4, 8)
    statistics[:, [0, 2]] = 0.0
    statistics[:, [1, 3]] = 1.0
    # With a = 0, b = 1, c = 0 and a teacher at 0 the gradient is e^z·z times the slope of the transform.
    out, zero, one = torch.empty(4, 250), torch.zeros(4), torch.ones(4)
    transforms = [1.0, softcap, 1.0, 1.0, 0.0, 1.0]
    TRITON.row_gradient(x, torch.zeros(4, 250), statistics, zero, one, zero, transforms, out)
    z = softcap * torch.tanh(x.double() / softcap)
    expected = z.exp() * z * (1 - (z / softcap) ** 2)
    close = x.abs() < 3
    assert ((out - expected) / expected).abs()[close].max() < 2e-6
    assert (out - expected).abs().max() < 1e-5


@given(
    seed=st.integers(0, 2**16),
    leading=st.sampled_from([(1,), (2,), (2, 3)]),
    vocab_size=st.sampled_from([1, 2, 17, 1023, 1024, 1025, 2500]),
    sides=st.sampled_from(SIDES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    schedule=st.sampled_from(["chunked", "recompute"]),
    workspace_bytes=st.sampled_from([1, 2**16, None]),
)
def test_random_problems(
    seed: int,
    leading: tuple[int, ...],
    vocab_size: int,
    sides: tuple[str, str],
    dtype: torch.dtype,
    masked: bool,
    schedule: str,
    workspace_bytes: int | None,
) -> None:
    student, teacher = sides
    case = make_case(
        seed, leading=leading, vocab_size=vocab_size, student=student, teacher=teacher, dtype=dtype, masked=masked
    )
    assert_no_worse_than_plain(case, schedule=schedule, workspace_bytes=workspace_bytes, backend="triton")


REFUSALS: list[tuple[str, Callable[[Tensor, Tensor], Any]]] = [
    ("student must be \\[n, V\\]", lambda s, t: TRITON.row_statistics(s[0], t[0], IDENTITY)),
    ("teacher must have the student's shape", lambda s, t: TRITON.row_statistics(s, t[:, :5], IDENTITY)),
    ("teacher must be one of", lambda s, t: TRITON.row_statistics(s, t.int(), IDENTITY)),
    ("teacher must be on the student's device", lambda s, t: PYTHON.row_statistics(s, t.to("meta"), IDENTITY)),
    ("student must have stride 1", lambda s, t: TRITON.row_statistics(s[:, ::2], t[:, ::2], IDENTITY)),
    (
        "weights must be \\[3\\] of torch.float32",
        lambda s, t: TRITON.row_loss_and_gradient(s, t, torch.ones(4), 0.8, list(ADD), IDENTITY, torch.empty(3, 10)),
    ),
    (
        "statistics must be \\[3, 8\\] of torch.float32",
        lambda s, t: TRITON.row_mixture(s, t, torch.ones(3, 4), [0.1, 0.1], IDENTITY),
    ),
    (
        "c must be \\[3\\] of torch.float32",
        lambda s, t: TRITON.row_mixture_gradient(
            s, t, torch.ones(3, 8), torch.ones(3), torch.ones(3), torch.ones(2), [0.1, 0.1], IDENTITY, s
        ),
    ),
    (
        "out must have the student's shape",
        lambda s, t: TRITON.row_loss_and_gradient(s, t, torch.ones(3), 0.8, list(ADD), IDENTITY, torch.empty(3, 9)),
    ),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS, ids=[message for message, _ in REFUSALS])
def test_what_the_kernels_would_misread_is_refused(message: str, call: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(*block(3, 10))
