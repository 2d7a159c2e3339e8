"""The seam: each backend's two functions of skewed divergences, as everything above them relies on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels.row_math.formulas import Coefficients
from eopd_kernels.row_math.mixture import MixtureStatistics, Skews
from eopd_kernels.row_math.statistics import RowStatistics, times_or_zero
from eopd_kernels.rows import FUNCTIONS, RowFunctions
from tests.conftest import columns_of_tiles, interpreted, relative_error, skip_unless
from tests.test_rows import DTYPES, IDENTITY, TRANSFORMS, block, random_coefficients

SKEWS = [Skews(0.1, 0.1), Skews(0.9, 0.25), Skews(0.0, 0.3), Skews(0.5, 0.0)]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@pytest.fixture
def functions(backend: str) -> RowFunctions:
    return FUNCTIONS[backend]


def against_mixture(own: Tensor, other: Tensor, skew: float) -> tuple[Tensor, Tensor, Tensor]:
    """λ, s and 1 − s of the definitions from the logarithms of both masses, by way of the mixture's."""
    if skew == 0:
        return own - other, torch.zeros_like(own), torch.ones_like(own)
    own_part, other_part = own + math.log(skew), other + math.log(1 - skew)
    mixture = torch.logaddexp(own_part, other_part)
    return own - mixture, (own_part - mixture).exp(), (other_part - mixture).exp()


class Exact:
    """The definitions in fp64; products with p = 0 or q = 0 are 0."""

    def __init__(self, z_s: Tensor, z_t: Tensor, skews: Skews) -> None:
        log_p, log_q = z_s.double().log_softmax(1), z_t.double().log_softmax(1)
        self.p, q = log_p.exp(), log_q.exp()
        forward_ratio, _, forward_rest = against_mixture(log_q, log_p, skews.forward)
        reverse_ratio, reverse_share, _ = against_mixture(log_p, log_q, skews.reverse)
        self.forward_rest = times_or_zero(q, forward_rest)
        self.reverse_ratio = times_or_zero(self.p, reverse_ratio)
        self.reverse_share = times_or_zero(self.p, reverse_share)
        terms = (times_or_zero(q, forward_ratio), self.reverse_ratio, self.forward_rest, self.reverse_share)
        self.mixture = MixtureStatistics(torch.stack([term.sum(1) for term in terms], 1))

    def gradient(self, coefficients: Coefficients) -> Tensor:
        """∂/∂z_s."""
        a, b, c = (k.double().unsqueeze(1) for k in coefficients)
        ratio = torch.where(b == 0, 0.0, b * (self.reverse_ratio - self.reverse_share))
        return a * self.p + ratio - c * self.forward_rest


def coefficients_of(mixture: MixtureStatistics, c_r: Tensor, c_f: Tensor) -> Coefficients:
    """Those of L = c_r·R + c_f·F."""
    a = times_or_zero(c_r, mixture.reverse_share - mixture.reverse_kl) + times_or_zero(c_f, mixture.forward_share)
    return Coefficients(a, c_r, c_f)


def transformed(x: Tensor, scale: float, softcap: float, temperature: float) -> Tensor:
    x = x * scale
    return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature


def weights(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """c_r and c_f, of both signs and each row's its own."""
    numbers = torch.randn(2, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    c_r, c_f = (0.4 + numbers).to(dtype).unbind()
    return c_r, c_f


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 3, 16, 257, 2049, 5003])
def test_both_functions(
    functions: RowFunctions, backend: str, vocab_size: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    skip_unless(vocab_size < 2000 or student_dtype == teacher_dtype, backend)
    student, teacher = block(4, vocab_size, student_dtype)[0], block(4, vocab_size, teacher_dtype)[1]
    compute = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    tolerance = 1e-12 if compute == torch.float64 else 3e-6
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    for skews in SKEWS[vocab_size % 2 :: 2]:
        exact = Exact(student, teacher, skews)
        mixture = functions.row_mixture(student, teacher, statistics, list(skews), IDENTITY)
        assert mixture.dtype == compute and mixture.shape == (4, 4)
        torch.testing.assert_close(mixture.double(), exact.mixture.packed, rtol=tolerance, atol=tolerance)
        coefficients = random_coefficients(4, compute)
        for out_dtype in {compute, student_dtype}:
            out = torch.empty(4, vocab_size, dtype=out_dtype)
            functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), IDENTITY, out)
            error = relative_error(out, exact.gradient(coefficients))
            assert error < 10 * tolerance + ROUNDING.get(out_dtype, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transforms", [IDENTITY, *TRANSFORMS])
def test_the_gradient_is_the_derivative(
    functions: RowFunctions, backend: str, transforms: list[float], dtype: torch.dtype
) -> None:
    """Of the definition, by autograd, with the coefficients that follow from the four numbers."""
    skip_unless(dtype == torch.float32 or transforms == IDENTITY, backend)
    student, teacher = block(4, 1100, dtype)
    c_r, c_f = weights(4, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    statistics = functions.row_statistics(student, teacher, transforms)
    z_t = transformed(teacher.double(), *transforms[3:])
    for skews in SKEWS:
        leaf = student.clone().double().requires_grad_()
        exact = Exact(transformed(leaf, *transforms[:3]), z_t, skews)
        (c_r * exact.mixture.reverse_kl + c_f * exact.mixture.forward_kl).sum().backward()
        assert leaf.grad is not None

        packed = functions.row_mixture(student, teacher, statistics, list(skews), transforms)
        assert relative_error(packed, exact.mixture.packed) < tolerance
        coefficients = coefficients_of(MixtureStatistics(packed), c_r, c_f)
        out = torch.empty(4, 1100, dtype=dtype)
        functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), transforms, out)
        assert relative_error(out, leaf.grad) < tolerance


def test_without_skews_they_are_the_plain_functions(functions: RowFunctions) -> None:
    student, teacher = block(4, 3001)
    packed = functions.row_statistics(student, teacher, IDENTITY)
    statistics = RowStatistics(packed)
    mixture = MixtureStatistics(functions.row_mixture(student, teacher, packed, [0.0, 0.0], IDENTITY))
    torch.testing.assert_close(mixture.forward_kl, statistics.forward_kl, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(mixture.reverse_kl, statistics.reverse_kl, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(mixture.forward_share, torch.ones(4))
    assert (mixture.reverse_share == 0).all()
    coefficients = random_coefficients(4, torch.float32)
    skewed, plain = torch.empty(4, 3001), torch.empty(4, 3001)
    functions.row_mixture_gradient(student, teacher, packed, *coefficients, [0.0, 0.0], IDENTITY, skewed)
    functions.row_gradient(student, teacher, packed, *coefficients, IDENTITY, plain)
    assert relative_error(skewed, plain) < 5e-6


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_looks_the_same_from_both_sides(functions: RowFunctions, beta: float) -> None:
    """JSD(β) = β·F + (1 − β)·R with α_f = β and α_r = 1 − β; with the sides exchanged it is JSD(1 − β)."""
    student, teacher = block(4, 1500)

    def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        statistics = functions.row_statistics(student, teacher, IDENTITY)
        packed = functions.row_mixture(student, teacher, statistics, [beta, 1 - beta], IDENTITY)
        mixture = MixtureStatistics(packed)
        return beta * mixture.forward_kl + (1 - beta) * mixture.reverse_kl

    there, back = divergence(student, teacher, beta), divergence(teacher, student, 1 - beta)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=3e-7)
    assert (there > 1e-4).all() and (there < math.log(2)).all()


def test_slices_of_the_vocabulary_add_up(functions: RowFunctions) -> None:
    student, teacher = block(3, 5003)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    whole = functions.row_mixture(student, teacher, statistics, [0.2, 0.6], IDENTITY)
    slices = [slice(0, 1), slice(1, 2100), slice(2100, 5003)]
    parts = [
        functions.row_mixture(student[:, columns], teacher[:, columns], statistics, [0.2, 0.6], IDENTITY)
        for columns in slices
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=3e-6, atol=1e-7)
    out, coefficients = torch.empty(3, 5003), random_coefficients(3, torch.float32)
    functions.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.2, 0.6], IDENTITY, out)
    for columns in slices:
        sides = student[:, columns], teacher[:, columns]
        part = torch.empty(3, columns.stop - columns.start)
        functions.row_mixture_gradient(*sides, statistics, *coefficients, [0.2, 0.6], IDENTITY, part)
        assert relative_error(part, out[:, columns]) < 1e-5


def test_unused_rows_are_zero_and_not_read(functions: RowFunctions) -> None:
    student, teacher = block(3, 2500)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    student[1], teacher[1] = math.nan, math.inf
    used = Coefficients(*(torch.tensor([0.5, 0.0, 0.5]) for _ in range(3)))
    for unread in (statistics[1], RowStatistics.empty(1, torch.float32, student.device).packed[0]):
        statistics[1] = unread
        out = torch.empty(3, 2500)
        functions.row_mixture_gradient(student, teacher, statistics, *used, [0.1, 0.1], IDENTITY, out)
        assert (out[1] == 0).all() and out.isfinite().all() and (out[[0, 2]] != 0).any(1).all()
        others = functions.row_mixture(student, teacher, statistics, [0.1, 0.1], IDENTITY)[[0, 2]]
        assert others.isfinite().all()


@pytest.mark.parametrize("unused", ["a", "b", "c", "ab", "ac", "bc"])
def test_unused_terms(functions: RowFunctions, unused: str) -> None:
    student, teacher = block(4, 1100)
    teacher[:, 7] = -math.inf  # λ of the plain reverse half is infinite there, which is nobody's business without b
    skews = Skews(0.3, 0.0 if "b" in unused else 0.2)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    coefficients = Coefficients(
        *(k * (name not in unused) for name, k in zip("abc", random_coefficients(4, torch.float32), strict=True))
    )
    out = torch.empty(4, 1100)
    functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), IDENTITY, out)
    assert relative_error(out, Exact(student, teacher, skews).gradient(coefficients)) < 1e-5


@pytest.mark.parametrize("layout", ["padded", "offset", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_row_stride_and_alignment(functions: RowFunctions, layout: str, dtype: torch.dtype) -> None:
    def laid_out(x: Tensor) -> Tensor:
        if layout == "broadcast":
            return x[:1].expand(4, -1)
        first = {"padded": 0, "offset": 1}[layout]
        wide = torch.full((4, 1333), math.nan, dtype=dtype)
        wide[:, first : first + 1300] = x
        return wide[:, first : first + 1300]

    strided = tuple(laid_out(x) for x in block(4, 1300, dtype))
    coefficients = random_coefficients(4, torch.float32)
    results = []
    for sides in (strided, tuple(x.clone(memory_format=torch.contiguous_format) for x in strided)):
        out = torch.full((4, 1310), 7.0)
        statistics = functions.row_statistics(*sides, IDENTITY)
        functions.row_mixture_gradient(*sides, statistics, *coefficients, [0.1, 0.4], IDENTITY, out[:, 3:1303])
        assert (out[:, :3] == 7).all() and (out[:, 1303:] == 7).all(), "wrote beside its rows"
        results.append((functions.row_mixture(*sides, statistics, [0.1, 0.4], IDENTITY), out))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [100, 5003])
def test_the_gradient_may_overwrite_the_student(functions: RowFunctions, dtype: torch.dtype, vocab_size: int) -> None:
    student, teacher = block(4, vocab_size, dtype)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    coefficients = random_coefficients(4, statistics.dtype)
    apart, in_place = torch.empty_like(student), student.clone()
    functions.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.1, 0.4], IDENTITY, apart)
    functions.row_mixture_gradient(in_place, teacher, statistics, *coefficients, [0.1, 0.4], IDENTITY, in_place)
    assert torch.equal(apart, in_place)


@pytest.mark.parametrize("skews", SKEWS)
@pytest.mark.parametrize("dead", [slice(0, 1), slice(40, -303), slice(2048, None)], ids=str)
@pytest.mark.parametrize("side", ["both", "student", "teacher"])
def test_columns_without_mass(functions: RowFunctions, backend: str, side: str, dead: slice, skews: Skews) -> None:
    student, teacher = block(4, columns_of_tiles(backend))
    if side != "teacher":
        student[:, dead] = -math.inf
    if side != "student":
        teacher[:, dead] = -math.inf
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    exact = Exact(student, teacher, skews)
    packed = functions.row_mixture(student, teacher, statistics, list(skews), IDENTITY)
    infinite = exact.mixture.packed.isposinf()
    assert torch.equal(packed.isposinf(), infinite) and not packed.isnan().any()
    assert bool(infinite.any()) == ((side, 0.0) in (("student", skews.forward), ("teacher", skews.reverse)))
    torch.testing.assert_close(packed.double(), exact.mixture.packed, rtol=1e-5, atol=3e-6)

    a, b, c = random_coefficients(4, torch.float32)
    coefficients = Coefficients(a, torch.zeros(4) if infinite[:, 1].any() else b, c)
    out = torch.empty_like(student)
    functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), IDENTITY, out)
    expected = exact.gradient(coefficients)
    assert relative_error(out, expected) < 3e-5 and (out[expected == 0] == 0).all()


@pytest.mark.parametrize("skews", [Skews(0.1, 0.4), Skews(0.0, 0.0)])
def test_a_nan_stays_in_its_row(functions: RowFunctions, backend: str, skews: Skews) -> None:
    coefficients, vocab_size = random_coefficients(4, torch.float32), columns_of_tiles(backend)
    for side, column in ((0, 0), (0, vocab_size - 1003), (1, 17), (1, vocab_size - 1)):
        sides = block(4, vocab_size)
        results = []
        for _ in range(2):
            statistics = functions.row_statistics(*sides, IDENTITY)
            out = torch.empty(4, vocab_size)
            functions.row_mixture_gradient(*sides, statistics, *coefficients, list(skews), IDENTITY, out)
            results.append((functions.row_mixture(*sides, statistics, list(skews), IDENTITY), out))
            sides[side][2, column] = math.nan
        (clean, clean_out), (packed, out) = results
        others = [0, 1, 3]
        assert torch.equal(packed[others], clean[others]) and torch.equal(out[others], clean_out[others])
        mixture = MixtureStatistics(packed)
        assert mixture.forward_kl[2].isnan() and mixture.reverse_kl[2].isnan() and out[2].isnan().any()


@pytest.mark.parametrize("scale", [300.0, 1e4, 1e30])
def test_large_logits(functions: RowFunctions, scale: float) -> None:
    """Rows that are all but one-hot, far from 0: finite figures, −log α at most."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(4, 5003, generator=generator) for _ in range(2))
    teacher[1] = student[1]
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    for skews in SKEWS[:2]:
        exact = Exact(student, teacher, skews)
        packed = functions.row_mixture(student, teacher, statistics, list(skews), IDENTITY)
        torch.testing.assert_close(packed.double(), exact.mixture.packed, rtol=1e-5, atol=1e-6)
        coefficients = random_coefficients(4, torch.float32)
        out = torch.empty(4, 5003)
        functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), IDENTITY, out)
        assert relative_error(out, exact.gradient(coefficients)) < 1e-5


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_small_divergences_survive_a_shift(functions: RowFunctions, backend: str, shift: float) -> None:
    """A student that has come close to the teacher: a KL of 2e-4 on logits around ±300."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, 5000 if interpreted(backend) else 20_000)
    teacher = 2 * torch.randn(shape, generator=generator) + shift
    student = teacher + 0.02 * torch.randn(shape, generator=generator)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    for skews in SKEWS:
        exact = Exact(student, teacher, skews)
        assert exact.mixture.reverse_kl.max() < 4e-4
        mixture = MixtureStatistics(functions.row_mixture(student, teacher, statistics, list(skews), IDENTITY))
        assert (mixture.forward_kl - exact.mixture.forward_kl).abs().max() < 6e-7
        assert (mixture.reverse_kl - exact.mixture.reverse_kl).abs().max() < 6e-7
        coefficients = coefficients_of(mixture, *weights(3))
        out = torch.empty(shape)
        functions.row_mixture_gradient(student, teacher, statistics, *coefficients, list(skews), IDENTITY, out)
        assert relative_error(out, exact.gradient(coefficients_of(exact.mixture, *weights(3)))) < 3e-4


@pytest.mark.parametrize("skew", [0.1, 0.37, 0.5, 0.93])
def test_equal_rows_do_not_diverge(functions: RowFunctions, skew: float) -> None:
    """Exactly: the weights of a mixture add up to 1 in fp32 too."""
    student, _ = block(4, 1500)
    statistics = functions.row_statistics(student, student, IDENTITY)
    mixture = MixtureStatistics(functions.row_mixture(student, student, statistics, [skew, skew], IDENTITY))
    assert (mixture.forward_kl == 0).all() and (mixture.reverse_kl == 0).all()
    torch.testing.assert_close(mixture.reverse_share, torch.full((4,), skew))


def test_no_rows(functions: RowFunctions) -> None:
    empty, nothing = torch.empty(0, 50), torch.empty(0)
    assert functions.row_mixture(empty, empty, torch.empty(0, 8), [0.1, 0.1], IDENTITY).shape == (0, 4)
    functions.row_mixture_gradient(
        empty, empty, torch.empty(0, 8), nothing, nothing, nothing, [0.1, 0.1], IDENTITY, torch.empty(0, 50)
    )


def test_each_is_a_sound_custom_op(functions: RowFunctions) -> None:
    student, teacher = block(3, 40)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    out, k = torch.zeros(3, 40), torch.tensor([0.3, -1.2, 1.0])
    calls = [
        (functions.row_mixture, (student, teacher, statistics, [0.1, 0.2], IDENTITY)),
        (functions.row_mixture_gradient, (student, teacher, statistics, k, k, k, [0.1, 0.2], IDENTITY, out)),
    ]
    for function, arguments in calls:
        torch.library.opcheck(function, arguments)  # type: ignore[arg-type]
