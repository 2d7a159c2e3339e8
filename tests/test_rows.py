"""The seam: each backend's row functions by themselves, as everything above them relies on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels.row_math.formulas import Coefficients, Combine, gated_coefficients, gated_loss, open_gate
from eopd_kernels.row_math.statistics import RowStatistics
from eopd_kernels.rows import FUNCTIONS, RowFunctions
from tests.conftest import columns_of_tiles, logits_like, relative_error, skip_unless

IDENTITY = [1.0, 0.0, 1.0] * 2
ADD = Combine(1.0, 0.0, 0.0, 0.7)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def functions(backend: str) -> RowFunctions:
    return FUNCTIONS[backend]


def block(n: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = logits_like(generator, n, vocab_size)
    return (teacher + torch.randn(n, vocab_size, generator=generator)).to(dtype), teacher.to(dtype)


def exact_gradient(student: Tensor, teacher: Tensor, coefficients: Coefficients) -> Tensor:
    """p·(a + b·(log p − log q)) − c·q in fp64 by log_softmax."""
    log_p, log_q = student.double().log_softmax(1), teacher.double().log_softmax(1)
    a, b, c = (k.double().unsqueeze(1) for k in coefficients)
    return log_p.exp() * (a + b * (log_p - log_q)) - c * log_q.exp()


def exact_statistics(student: Tensor, teacher: Tensor) -> RowStatistics:
    return RowStatistics.of(student.double(), teacher.double())


def random_coefficients(n: int, dtype: torch.dtype) -> Coefficients:
    numbers = torch.randn(3, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Coefficients(*numbers.to(dtype))


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 3, 16, 257, 2049, 5003])
def test_the_three_functions(
    functions: RowFunctions, backend: str, vocab_size: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    skip_unless(vocab_size < 2000 or student_dtype == teacher_dtype, backend)
    student, teacher = block(5, vocab_size, student_dtype)[0], block(5, vocab_size, teacher_dtype)[1]
    compute = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    tolerance = 1e-12 if compute == torch.float64 else 3e-6
    exact = exact_statistics(student, teacher)

    packed = functions.row_statistics(student, teacher, IDENTITY)
    assert packed.dtype == compute and packed.shape == (5, 8)
    for i in range(8):
        assert relative_error(packed[:, i], exact.packed[:, i]) < 10 * tolerance

    coefficients = random_coefficients(5, compute)
    for out_dtype in (compute, student_dtype):
        out = torch.empty(5, vocab_size, dtype=out_dtype)
        functions.row_gradient(student, teacher, packed, *coefficients, IDENTITY, out)
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}.get(out_dtype, 0)
        error = relative_error(out, exact_gradient(student, teacher, coefficients))
        assert error < 10 * tolerance + rounding

    weights = torch.tensor([0.3, 0.0, -1.2, 1.0, 2.5], dtype=compute)
    out = torch.empty(5, vocab_size, dtype=compute)
    threshold = float(exact.teacher_entropy.median()) + 1e-3
    fused, gate, loss = functions.row_loss_and_gradient(student, teacher, weights, threshold, list(ADD), IDENTITY, out)
    assert fused.dtype == gate.dtype == loss.dtype == compute
    expected_gate = open_gate(exact, threshold) * (weights != 0)
    assert torch.equal(gate.double(), expected_gate)
    read = weights != 0
    assert relative_error(fused[read], exact.packed[read]) < 10 * tolerance
    assert relative_error(loss, (exact.reverse_kl + 0.7 * expected_gate * exact.forward_kl) * read) < 10 * tolerance
    coefficients = gated_coefficients(exact, expected_gate, ADD, weights.double())
    assert relative_error(out, exact_gradient(student, teacher, coefficients)) < 10 * tolerance


@pytest.mark.parametrize(
    "combine", [Combine(0.6, -0.5, 0.0, 2.0), Combine(-1.0, 0.0, 0.3, 0.4)], ids=["gate", "constant"]
)
def test_the_loss_is_that_of_a_row_of_weight_one(functions: RowFunctions, combine: Combine) -> None:
    student, teacher = block(6, 300)
    exact, out = exact_statistics(student, teacher), torch.empty(6, 300)
    threshold = float(exact.teacher_entropy.median()) + 1e-3
    weights = torch.tensor([0.3, -1.2, 1.0, 2.5, 1e-6, 7.0])
    _, gate, loss = functions.row_loss_and_gradient(student, teacher, weights, threshold, list(combine), IDENTITY, out)
    assert 0 < gate.sum() < 6
    c_r, c_f = combine(gate.double())
    assert relative_error(loss, c_r * exact.reverse_kl + c_f * exact.forward_kl) < 3e-5


def test_a_row_of_weight_zero_is_not_read(functions: RowFunctions) -> None:
    student, teacher = block(3, 100)
    student[1], teacher[1] = math.nan, math.inf
    out = torch.empty(3, 100)
    weights = torch.tensor([1.0, 0.0, 1.0])
    packed, gate, loss = functions.row_loss_and_gradient(student, teacher, weights, 0.8, list(ADD), IDENTITY, out)
    assert torch.equal(packed[1], RowStatistics.empty(1, torch.float32, student.device).packed[0])
    assert gate[1] == loss[1] == 0 and (loss[[0, 2]] > 0).all() and loss.isfinite().all()
    assert (out[1] == 0).all() and out.isfinite().all() and packed[[0, 2]].isfinite().all()

    zero = Coefficients(*(torch.tensor([0.5, 0.0, 0.5]) for _ in range(3)))
    out = torch.empty(3, 100)
    functions.row_gradient(student, teacher, packed, *zero, IDENTITY, out)
    assert (out[1] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "offset", "broadcast", "backwards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_row_stride_and_alignment(functions: RowFunctions, layout: str, dtype: torch.dtype) -> None:
    def lay_out(x: Tensor) -> Tensor:
        if layout == "padded":
            return torch.full((4, 333), math.nan, dtype=dtype).index_copy_(1, torch.arange(300), x)[:, :300]
        if layout == "offset":
            return torch.full((4, 301), math.nan, dtype=dtype).index_copy_(1, 1 + torch.arange(300), x)[:, 1:]
        if layout == "broadcast":
            return x[:1].clone().expand(4, 300)
        return x.clone().t().contiguous().t().contiguous()[::2].repeat_interleave(2, 0)

    student, teacher = block(4, 300, dtype)
    strided = lay_out(student), lay_out(teacher)
    dense = tuple(x.clone(memory_format=torch.contiguous_format) for x in strided)
    results = []
    for s, t in (strided, dense):
        out = torch.full((4, 310), 7.0)
        weights = torch.tensor([0.3, -1.2, 1.0, 2.5])
        rows = functions.row_loss_and_gradient(s, t, weights, 2.0, list(ADD), IDENTITY, out[:, 3:303])
        assert (out[:, :3] == 7).all() and (out[:, 303:] == 7).all(), "wrote beside its rows"
        results.append((*rows, out))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [100, 5003])
def test_the_gradient_may_overwrite_the_student(
    functions: RowFunctions, backend: str, dtype: torch.dtype, vocab_size: int
) -> None:
    skip_unless(vocab_size < 2000 or dtype == torch.float32, backend)
    student, teacher = block(4, vocab_size, dtype)
    weights = torch.tensor([0.3, 0.0, 1.0, 2.5], dtype=functions.row_statistics(student, teacher, IDENTITY).dtype)
    apart, in_place = torch.empty_like(student), student.clone()
    one = functions.row_loss_and_gradient(student, teacher, weights, 2.0, list(ADD), IDENTITY, apart)
    two = functions.row_loss_and_gradient(in_place, teacher, weights, 2.0, list(ADD), IDENTITY, in_place)
    assert torch.equal(apart, in_place) and all(map(torch.equal, one, two))

    apart, in_place = torch.empty_like(student), student.clone()
    coefficients = random_coefficients(4, weights.dtype)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    functions.row_gradient(student, teacher, statistics, *coefficients, IDENTITY, apart)
    functions.row_gradient(in_place, teacher, statistics, *coefficients, IDENTITY, in_place)
    assert torch.equal(apart, in_place)


TRANSFORMS = [
    [0.5, 0.0, 1.0, 2.0, 0.0, 1.0],
    [1.0, 0.0, 3.0, 1.0, 0.0, 0.4],
    [1.0, 9.0, 1.0, 1.0, 0.0, 1.0],
    [0.7, 12.0, 1.5, 1.3, 20.0, 0.8],
    [-0.5, 0.0, 1.0, -0.7, 15.0, 2.0],
]


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_transforms_and_their_slope(functions: RowFunctions, transforms: list[float], dtype: torch.dtype) -> None:
    def z(x: Tensor, scale: float, softcap: float, temperature: float) -> Tensor:
        x = x * scale
        return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature

    student, teacher = block(6, 700, dtype)
    leaf = student.double().requires_grad_()
    z_s, z_t = z(leaf, *transforms[:3]), z(teacher.double(), *transforms[3:])
    exact = exact_statistics(z_s.detach(), z_t)
    weights = torch.tensor([0.3, -1.2, 1.0, 2.5, 0.7, 1.1], dtype=torch.float64)
    threshold = float(exact.teacher_entropy.median()) + 1e-3
    gate = open_gate(exact, threshold)
    coefficients = gated_coefficients(exact, gate, ADD, weights)
    z_s.backward(exact_gradient(z_s.detach(), z_t, coefficients))
    assert leaf.grad is not None

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    out = torch.empty(6, 700, dtype=compute)
    packed, ours, _ = functions.row_loss_and_gradient(
        student, teacher, weights.to(compute), threshold, list(ADD), transforms, out
    )
    assert torch.equal(ours.double(), gate)
    assert relative_error(RowStatistics(packed).reverse_kl, exact.reverse_kl) < tolerance
    assert relative_error(out, leaf.grad) < tolerance
    again = torch.empty_like(out)
    functions.row_gradient(student, teacher, packed, *(k.to(compute) for k in coefficients), transforms, again)
    assert relative_error(again, leaf.grad) < tolerance


# The last is columns 2,048 to 4,096 of 5,003, a tile; of 2,503 the first.
@pytest.mark.parametrize("dead", [slice(0, 1), slice(40, -1003), slice(-1003, None), slice(-2955, -907)], ids=str)
@pytest.mark.parametrize("side", ["both", "student", "teacher"])
def test_columns_without_mass(functions: RowFunctions, backend: str, side: str, dead: slice) -> None:
    vocab_size = columns_of_tiles(backend)
    student, teacher = block(4, vocab_size)
    if side != "teacher":
        student[:, dead] = -math.inf
    if side != "student":
        teacher[:, dead] = -math.inf
    statistics = RowStatistics(functions.row_statistics(student, teacher, IDENTITY))
    exact = exact_statistics(student, teacher)
    for name in ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl"):
        value, truth = getattr(statistics, name), getattr(exact, name)
        assert torch.equal(value.isposinf(), truth.isposinf()) and not value.isnan().any(), name
        finite = truth.isfinite()
        assert relative_error(value[finite], truth[finite]) < 1e-4, name

    # The half that stays finite still has its gradient.
    combine = {"both": ADD, "student": Combine(1.0, 0.0, 0.0, 0.0), "teacher": Combine(0.0, 0.0, 1.0, 0.0)}[side]
    weights, out = torch.tensor([0.3, -1.2, 1.0, 2.5]), torch.empty(4, vocab_size)
    _, gate, loss = functions.row_loss_and_gradient(student, teacher, weights, 2.0, list(combine), IDENTITY, out)
    assert relative_error(loss, gated_loss(exact, gate.double(), combine)) < 1e-4 and loss.isfinite().all()
    alive = torch.ones(vocab_size, dtype=torch.bool)
    alive[dead] = side == "teacher"
    coefficients = gated_coefficients(exact, gate.double(), combine, weights.double())
    if side == "teacher":
        log_p, q = student.double().log_softmax(1), teacher.double().softmax(1)
        expected = weights.double().unsqueeze(1) * (log_p.exp() - q)
    else:
        expected = exact_gradient(student[:, alive], teacher[:, alive], coefficients)
        if side == "student":  # q is normalised over the dead columns too
            shift = exact.teacher_sum.log() + exact.teacher_max
            log_p = student[:, alive].double().log_softmax(1)
            log_q = teacher[:, alive].double() - shift.unsqueeze(1)
            a, b, _ = (k.unsqueeze(1) for k in coefficients)
            expected = log_p.exp() * (a + b * (log_p - log_q))
    assert relative_error(out[:, alive], expected) < 1e-4
    assert (out[:, ~alive] == 0).all()


@pytest.mark.parametrize("combine", [ADD, Combine(0.0, 0.0, 1.0, 0.0), Combine(1.0, 0.0, 0.0, 0.0)])
def test_a_nan_stays_in_its_row(functions: RowFunctions, backend: str, combine: Combine) -> None:
    vocab_size = columns_of_tiles(backend)
    for side, column in ((0, 0), (0, vocab_size - 1003), (1, 17), (1, vocab_size - 1)):
        blocks = block(4, vocab_size)
        out = torch.empty(4, vocab_size)
        weights = torch.ones(4)
        clean, _, _ = functions.row_loss_and_gradient(*blocks, weights, 2.0, list(combine), IDENTITY, out)
        blocks[side][2, column] = math.nan
        out = torch.empty(4, vocab_size)
        packed, gate, loss = functions.row_loss_and_gradient(*blocks, weights, 2.0, list(combine), IDENTITY, out)
        statistics = RowStatistics(packed)
        assert statistics.reverse_kl[2].isnan() and statistics.forward_kl[2].isnan()
        assert loss[2].isnan() and loss[[0, 1, 3]].isfinite().all()
        others = [0, 1, 3]
        assert torch.equal(packed[others], clean[others]) and out[others].isfinite().all()
        assert out[2].isnan().any()
        again = torch.empty(4, vocab_size)
        coefficients = gated_coefficients(statistics, gate, combine, weights)
        functions.row_gradient(*blocks, packed, *coefficients, IDENTITY, again)
        assert again[others].isfinite().all() and again[2].isnan().any()


@pytest.mark.parametrize("scale", [300.0, 1e4, 1e30])
def test_large_logits(functions: RowFunctions, backend: str, scale: float) -> None:
    """Rows that are all but one-hot, far from 0: finite figures, by the definition."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(4, columns_of_tiles(backend), generator=generator) for _ in range(2))
    teacher[1] = student[1]
    statistics = RowStatistics(functions.row_statistics(student, teacher, IDENTITY))
    exact = exact_statistics(student, teacher)
    for name in ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl"):
        torch.testing.assert_close(getattr(statistics, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-7)
    assert statistics.reverse_kl[1].abs() < 1e-6


def test_no_rows(functions: RowFunctions) -> None:
    empty = torch.empty(0, 50)
    assert functions.row_statistics(empty, empty, IDENTITY).shape == (0, 8)
    nothing = torch.empty(0)
    functions.row_gradient(empty, empty, torch.empty(0, 8), nothing, nothing, nothing, IDENTITY, torch.empty(0, 50))
    rows = functions.row_loss_and_gradient(empty, empty, nothing, 0.8, list(ADD), IDENTITY, torch.empty(0, 50))
    assert [tuple(numbers.shape) for numbers in rows] == [(0, 8), (0,), (0,)]


def test_each_is_a_sound_custom_op(functions: RowFunctions) -> None:
    student, teacher = block(3, 40)
    statistics = functions.row_statistics(student, teacher, IDENTITY)
    out, per_row = torch.zeros(3, 40), torch.tensor([0.3, -1.2, 1.0])
    calls = [
        (functions.row_statistics, (student, teacher, IDENTITY)),
        (functions.row_gradient, (student, teacher, statistics, per_row, per_row, per_row, IDENTITY, out)),
        (functions.row_loss_and_gradient, (student, teacher, per_row, 2.0, list(ADD), IDENTITY, out)),
    ]
    for function, arguments in calls:
        torch.library.opcheck(function, arguments)  # type: ignore[arg-type]
