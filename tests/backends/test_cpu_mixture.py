"""Skewed divergences on every instruction set, against the float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels.backends import cpu
from eopd_kernels.row_math.formulas import Coefficients
from eopd_kernels.row_math.mixture import Skews
from eopd_kernels.rows import FUNCTIONS
from tests.backends.test_cpu_capability import PLAIN, SIZES, TRANSFORMED, check_gradient, logits, transform
from tests.test_rows_mixture import Exact

CPU = FUNCTIONS["cpu"]

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("capability"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Results:
    """The four numbers of every row, and the gradient with coefficients of both signs, in ``out``."""

    def __init__(
        self, student: Tensor, teacher: Tensor, skews: Skews, out: Tensor, transforms: list[float] = PLAIN
    ) -> None:
        statistics = CPU.row_statistics(student, teacher, transforms)
        self.mixture = CPU.row_mixture(student, teacher, statistics, list(skews), transforms)
        ends = ((-1.1, 0.7), (0.3, 1.9), (1.3, -0.2))
        numbers = (torch.linspace(*pair, len(student), dtype=statistics.dtype) for pair in ends)
        self.coefficients = Coefficients(*numbers)
        self.out = out
        CPU.row_mixture_gradient(student, teacher, statistics, *self.coefficients, list(skews), transforms, out)

    def check(self, exact: Exact, slope: Tensor, tolerance: float, rounding: float = 0.0) -> None:
        torch.testing.assert_close(self.mixture.double(), exact.mixture.packed, rtol=tolerance, atol=tolerance)
        a, b, c = (k.double().abs().unsqueeze(1) for k in self.coefficients)
        terms = a * exact.p + b * (exact.reverse_ratio.abs() + exact.reverse_share) + c * exact.forward_rest
        scale = (terms * slope).amax(1, keepdim=True)
        check_gradient(self.out, (exact.gradient(self.coefficients) * slope, scale), tolerance + rounding)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("transforms", [PLAIN, TRANSFORMED])
@pytest.mark.parametrize("skews", [Skews(0.1, 0.7), Skews(0.5, 0.02), Skews(0.0, 0.0)])
def test_both_functions(vocab_size: int, transforms: list[float], skews: Skews) -> None:
    student, teacher = logits(9, vocab_size)
    (z_s, slope), (z_t, _) = transform(student, *transforms[:3]), transform(teacher, *transforms[3:])
    results = Results(student, teacher, skews, torch.full_like(student, math.nan), transforms)
    results.check(Exact(z_s, z_t, skews), slope, 2e-5 if transforms is TRANSFORMED else 5e-6)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    student, teacher = logits(5, 2101)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    real = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    skews = Skews(0.1, 0.3)
    results = Results(student, teacher, skews, torch.full((5, 2101), math.nan, dtype=out_dtype))
    assert results.mixture.dtype == real
    rounding = 0 if out_dtype == real else torch.finfo(out_dtype).eps / 2
    tolerance = 1e-12 if real == torch.float64 else 5e-6
    results.check(Exact(student, teacher, skews), torch.ones(1), tolerance, rounding)


def test_large_outputs_past_the_caches() -> None:
    """Past 16 MiB `out` is streamed: bit for bit what it is in place."""
    student, teacher = logits(131, 32771)
    in_place = student.clone()
    streamed = Results(student, teacher, Skews(0.1, 0.3), torch.full_like(student, math.nan))
    cached = Results(in_place, teacher, Skews(0.1, 0.3), in_place)
    assert torch.equal(streamed.mixture, cached.mixture) and torch.equal(streamed.out, cached.out)
    assert not streamed.out.isnan().any()


def test_the_logarithm_everywhere() -> None:
    """Columns in which the student has mass 1 and the teacher e^-x: −log(α + (1 − α)·e^−x) less the share."""
    x = torch.cat([torch.linspace(0, 40, 20001), torch.logspace(-9, -1, 2000), torch.tensor([80.0, 1e4, math.inf])])
    student, statistics = torch.zeros(1, len(x)), torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    one, none, out = torch.ones(1), torch.zeros(1), torch.empty(1, len(x))
    for skew in (1e-30, 1e-6, 0.1, 0.5, 0.9):
        CPU.row_mixture_gradient(student, -x[None], statistics, none, one, none, [0.5, skew], PLAIN, out)
        own = torch.tensor(skew).double()
        mixture = own + (1 - own) * (-x.double()).exp()
        truth = -mixture.log() - own / mixture
        assert ((out[0] - truth).abs() / truth.abs().clamp(min=1)).max() < 4e-7, skew
