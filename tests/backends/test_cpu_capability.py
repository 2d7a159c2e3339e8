"""Every instruction set against float64 formulas, written out here from docs/math.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels.backends import cpu
from eopd_kernels.rows import FUNCTIONS

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.usefixtures("capability"),
]

CPU = FUNCTIONS["cpu"]
PLAIN = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
TRANSFORMED = [1.3, 20.0, 0.7, 0.6, 0.0, 1.4]
COMBINE = [0.9, -0.3, 0.2, 1.1]
SIZES = [1, 7, 63, 2048, 2049, 5000]


def logits(n: int, vocab_size: int, kl: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows from nearly one-hot to nearly uniform, of both signs, the teacher a perturbed student; float32."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 6.0, n).unsqueeze(1)
    student = torch.randn(n, vocab_size, generator=generator) * spread
    return student, student + math.sqrt(kl) * torch.randn(n, vocab_size, generator=generator)


def upstream(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of both signs, none of them 0 or 1."""
    return (torch.linspace(-1.7, 2.3, n, dtype=torch.float64) + 0.013).to(dtype)


def transform(x: Tensor, scale: float, softcap: float, temperature: float) -> tuple[Tensor, Tensor]:
    """z and dz/dx, float64."""
    x = x.double()
    if softcap == 0:
        return x * scale / temperature, torch.full_like(x, scale / temperature)
    tanh = torch.tanh(scale * x / softcap)
    return softcap * tanh / temperature, scale * (1 - tanh**2) / temperature


class Truth:
    """Everything in float64; products with p = 0 or q = 0 are 0."""

    def __init__(self, student: Tensor, teacher: Tensor, transforms: list[float] = PLAIN) -> None:
        z_s, self.slope = transform(student, *transforms[:3])
        z_t, _ = transform(teacher, *transforms[3:])
        self.log_p, self.log_q = z_s.log_softmax(1), z_t.log_softmax(1)
        self.p, self.q = self.log_p.exp(), self.log_q.exp()
        self.log_ratio = torch.where((self.p == 0) & (self.q == 0), 0.0, self.log_p - self.log_q)
        self.teacher_entropy = -self.times(self.q, self.log_q).sum(1)
        self.student_entropy = -self.times(self.p, self.log_p).sum(1)
        self.forward_kl = self.times(self.q, -self.log_ratio).sum(1)
        self.reverse_kl = self.times(self.p, self.log_ratio).sum(1)
        self.student_max, self.teacher_max = z_s.amax(1), z_t.amax(1)
        self.student_lse, self.teacher_lse = z_s.logsumexp(1), z_t.logsumexp(1)

    @staticmethod
    def times(mass: Tensor, x: Tensor) -> Tensor:
        return torch.where(mass == 0, 0.0, mass * x)

    def gradient(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and per row the largest sum of its terms' magnitudes: what its rounding errors scale with."""
        a, b, c = (k.double().unsqueeze(1) for k in (a, b, c))
        ratio = torch.where(b == 0, 0.0, b * self.log_ratio)
        gradient = self.times(self.p, a + ratio) - c * self.q
        scale = self.times(self.p, a.abs() + ratio.abs()) + c.abs() * self.q
        return gradient * self.slope, (scale * self.slope).amax(1, keepdim=True)

    def coefficients(self, gate: Tensor, weights: Tensor, combine: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        r0, r1, f0, f1 = combine
        c_r, c_f, w = r0 + r1 * gate.double(), f0 + f1 * gate.double(), weights.double()
        return w * (c_f - torch.where(c_r == 0, 0.0, c_r * self.reverse_kl)), w * c_r, w * c_f


def derived(statistics: Tensor) -> dict[str, Tensor]:
    m_s, z_s, m_t, z_t, a, p, b, q = statistics.double().unbind(1)
    ratio = torch.log(z_s / z_t)
    return {
        "student_max": m_s,
        "teacher_max": m_t,
        "student_lse": m_s + z_s.log(),
        "teacher_lse": m_t + z_t.log(),
        "teacher_entropy": z_t.log() - a / z_t,
        "student_entropy": z_s.log() - b / z_s,
        "forward_kl": p / z_t + ratio,
        "reverse_kl": q / z_s - ratio,
    }


def check_statistics(statistics: Tensor, truth: Truth, tolerance: float = 3e-6) -> None:
    got = derived(statistics)
    expected = {name: getattr(truth, name) for name in got}
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check_gradient(gradient: Tensor, expected: tuple[Tensor, Tensor], tolerance: float = 5e-6) -> None:
    """A kernel that drops a term, or takes a wrong coefficient, is off by a large part of the scale."""
    exact, scale = expected
    error = (gradient.double() - exact).abs() / torch.where(scale == 0, 1.0, scale)
    assert error.max() <= tolerance, f"error relative to the row's scale: {error.max():.2e}"


def threshold_between(truth: Truth) -> float:
    """One that opens the gate on some rows only, and on none by a hair."""
    entropies = truth.teacher_entropy.sort().values
    widest = (entropies[1:] - entropies[:-1]).argmax()
    return float((entropies[widest] + entropies[widest + 1]) / 2)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("transforms", [PLAIN, TRANSFORMED])
def test_all_three_functions(vocab_size: int, transforms: list[float]) -> None:
    n = 9
    student, teacher = logits(n, vocab_size)
    truth, weights = Truth(student, teacher, transforms), upstream(n)
    threshold = threshold_between(truth)
    out = torch.full_like(student, math.nan)
    statistics, gate, _ = CPU.row_loss_and_gradient(student, teacher, weights, threshold, COMBINE, transforms, out)
    check_statistics(statistics, truth)
    assert torch.equal(statistics, CPU.row_statistics(student, teacher, transforms))
    assert torch.equal(gate.double(), (truth.teacher_entropy > threshold).double())
    assert vocab_size == 1 or 0 < gate.sum() < n
    a, b, c = truth.coefficients(gate, weights, COMBINE)
    check_gradient(out, truth.gradient(a, b, c), 2e-5 if transforms is TRANSFORMED else 5e-6)

    a, b, c = (torch.linspace(*ends, n) for ends in ((-1.1, 0.7), (0.3, 1.9), (1.3, -0.2)))
    out.fill_(math.nan)
    CPU.row_gradient(student, teacher, statistics, a, b, c, transforms, out)
    check_gradient(out, truth.gradient(a, b, c), 2e-5 if transforms is TRANSFORMED else 5e-6)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, out_dtype: torch.dtype, softcap: float) -> None:
    n, vocab_size = 5, 2101
    student, teacher = logits(n, vocab_size)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    real = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    transforms = [1.0, softcap, 1.0, 1.0, softcap, 1.0]
    truth, weights = Truth(student, teacher, transforms), upstream(n, real)
    out = torch.full((n, vocab_size), math.nan, dtype=out_dtype)
    statistics, gate, _ = CPU.row_loss_and_gradient(student, teacher, weights, 2.5, COMBINE, transforms, out)
    assert statistics.dtype == gate.dtype == real
    check_statistics(statistics, truth, 1e-12 if real == torch.float64 else 3e-6)
    expected = truth.gradient(*truth.coefficients(gate, weights, COMBINE))
    # round to nearest: half a unit in the last place of the largest entry; float16 also has a smallest subnormal
    computed = 1e-12 if real == torch.float64 else 2e-5 if softcap else 5e-6
    tolerance = computed + torch.finfo(out_dtype).eps / 2 * (0 if out_dtype == real else 1)
    if out_dtype == torch.float16:
        tolerance += float(2.0**-25 / expected[1].min())
    check_gradient(out, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    student, teacher = logits(9, 5000)
    statistics = CPU.row_statistics(student, teacher, PLAIN)
    a, b, c = (torch.linspace(*ends, 9) for ends in ((-900.0, 9e4), (0.3, 1e5), (1.3, -2e5)))
    wide, narrow = torch.empty(9, 5000), torch.empty(9, 5000, dtype=dtype)
    CPU.row_gradient(student, teacher, statistics, a, b, c, PLAIN, wide)
    CPU.row_gradient(student, teacher, statistics, a, b, c, PLAIN, narrow)
    assert torch.equal(narrow, wide.to(dtype))
    assert dtype != torch.float16 or narrow.isinf().any()


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        wide = torch.full((len(x), x.shape[1] + 13), math.nan, dtype=x.dtype)
        wide[:, 5 : 5 + x.shape[1]] = x
        return wide[:, 5 : 5 + x.shape[1]]
    if layout == "reversed heads":  # rows of a [V, n] tensor cannot be; rows interleaved with others can
        wide = torch.full((len(x), 3, x.shape[1]), math.nan, dtype=x.dtype)
        wide[:, 1] = x
        return wide[:, 1]
    return x.clone()


@pytest.mark.parametrize("student_layout", ["plain", "strided", "reversed heads"])
@pytest.mark.parametrize("out_layout", ["plain", "strided", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(student_layout: str, out_layout: str, dtype: torch.dtype) -> None:
    """Bit for bit what contiguous tensors give; nothing outside the block is touched."""
    n, vocab_size = 4, 4099
    student, teacher = (x.to(dtype) for x in logits(n, vocab_size))
    weights, expected = upstream(n), torch.empty(n, vocab_size, dtype=dtype)
    statistics, _, _ = CPU.row_loss_and_gradient(student, teacher, weights, 3.0, COMBINE, PLAIN, expected)
    moved = laid_out(student, student_layout)
    out = moved if out_layout == "in place" else laid_out(torch.zeros_like(student), out_layout)
    again, _, _ = CPU.row_loss_and_gradient(moved, laid_out(teacher, "strided"), weights, 3.0, COMBINE, PLAIN, out)
    assert torch.equal(again, statistics) and torch.equal(out, expected)
    if out._base is not None and out._base.numel() > out.numel():
        assert int(out._base.isnan().sum()) == out._base.numel() - out.numel()


def test_one_row_for_all() -> None:
    """Row stride 0."""
    student, teacher = logits(6, 3001)
    out, expected = torch.empty(6, 3001), torch.empty(6, 3001)
    CPU.row_loss_and_gradient(student, teacher[:1].expand(6, -1), upstream(6), 3.0, COMBINE, PLAIN, out)
    CPU.row_loss_and_gradient(student, teacher[:1].repeat(6, 1), upstream(6), 3.0, COMBINE, PLAIN, expected)
    assert torch.equal(out, expected)


def test_large_outputs_past_the_caches() -> None:
    """Past 16 MiB `out` is streamed; its rows need not begin at a multiple of a register."""
    n, vocab_size = 131, 32771
    student, teacher = logits(n, vocab_size)
    wide = torch.full((n * vocab_size + 3,), math.nan)
    out = wide[3:].view(n, vocab_size)
    _statistics, gate, _ = CPU.row_loss_and_gradient(student, teacher, upstream(n), 4.0, COMBINE, PLAIN, out)
    some = slice(60, 70)
    expected = torch.empty(10, vocab_size)
    CPU.row_loss_and_gradient(
        student[some], teacher[some], upstream(n)[some].contiguous(), 4.0, COMBINE, PLAIN, expected
    )
    assert torch.equal(out[some], expected)
    assert wide[:3].isnan().all() and not out.isnan().any() and 0 < gate.sum() < n
    in_place = student.clone()
    CPU.row_loss_and_gradient(in_place, teacher, upstream(n), 4.0, COMBINE, PLAIN, in_place)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_small_divergences_survive_a_shift(shift: float) -> None:
    """KL of 2e-4 on logits around 300: an uncentred log-sum-exp is off by 3e-5 there."""
    student, teacher = logits(8, 50000, kl=4e-4)
    student, teacher = student + shift, teacher + shift
    truth = Truth(student, teacher)
    got = derived(CPU.row_statistics(student, teacher, PLAIN))
    assert truth.reverse_kl.median() < 4e-4
    for name in ("forward_kl", "reverse_kl"):
        assert (got[name] - getattr(truth, name)).abs().max() < 6e-7
    out = torch.empty_like(student)
    _statistics, gate, _ = CPU.row_loss_and_gradient(student, teacher, upstream(8), 5.0, COMBINE, PLAIN, out)
    check_gradient(out, truth.gradient(*truth.coefficients(gate, upstream(8), COMBINE)), 1e-4)


def test_a_tail_beside_a_large_column() -> None:
    """Less than half a unit in the last place of 1: a column of the tail is lost where it is added to the large one."""
    student = torch.full((1, 2048), -17.5)
    student[0, 0] = 0
    statistics = CPU.row_statistics(student, student, PLAIN)[0].double()
    exact = student.double().exp().sum()
    assert exact > 1 + 5e-5 and (statistics[[1, 3]] - exact).abs().max() < 1.5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", ["both", "teacher", "student"])
@pytest.mark.parametrize("columns", [slice(3, 4), slice(0, 4096), slice(1000, 7000), slice(4096, 8192)])
def test_columns_of_minus_infinity(dtype: torch.dtype, masked: str, columns: slice) -> None:
    student, teacher = (x.to(dtype) for x in logits(3, 8192))
    if masked != "teacher":
        student[:, columns] = -math.inf
    if masked != "student":
        teacher[:, columns] = -math.inf
    truth = Truth(student, teacher)
    statistics = CPU.row_statistics(student, teacher, PLAIN)
    check_statistics(statistics, truth)
    assert bool(truth.reverse_kl.isinf().all()) == (masked == "teacher")
    assert bool(truth.forward_kl.isinf().all()) == (masked == "student")
    weights = upstream(3, statistics.dtype)
    combine = [0.0, 0.0, 0.7, 0.0] if masked == "teacher" else COMBINE
    out = torch.empty_like(student)
    _, gate, _ = CPU.row_loss_and_gradient(student, teacher, weights, 1.0, combine, PLAIN, out)
    expected = truth.gradient(*truth.coefficients(gate, weights, combine))
    check_gradient(out, expected, 2e-3 if dtype == torch.float16 else 5e-6)


@pytest.mark.parametrize("value", [1e30, torch.finfo(torch.float32).max])
def test_columns_of_a_large_finite_number(value: float) -> None:
    """Masks by a large negative number weigh nothing, however many; a single large positive one takes all."""
    student, teacher = logits(4, 6000)
    student[:, 100:5000] = teacher[:, 100:5000] = -value
    check_statistics(CPU.row_statistics(student, teacher, PLAIN), Truth(student, teacher))
    student[:, 50] = teacher[:, 50] = 1e30
    got = derived(CPU.row_statistics(student, teacher, PLAIN))
    assert all(bool((got[name] == 0).all()) for name in ("teacher_entropy", "forward_kl", "reverse_kl"))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("column", [0, 2047, 4998])
def test_a_nan_stays_in_its_row(side: str, column: int) -> None:
    student, teacher = logits(5, 5000)
    clean, dirty = torch.empty_like(student), torch.empty_like(student)
    numbers, _, _ = CPU.row_loss_and_gradient(student, teacher, upstream(5), 3.0, COMBINE, PLAIN, clean)
    payload = torch.tensor(0x7FC00155, dtype=torch.int32).view(torch.float32)
    (student if side == "student" else teacher)[2, column] = payload
    statistics, _, _ = CPU.row_loss_and_gradient(student, teacher, upstream(5), 3.0, COMBINE, PLAIN, dirty)
    others = [0, 1, 3, 4]
    assert torch.equal(statistics[others], numbers[others]) and torch.equal(dirty[others], clean[others])
    got = derived(statistics[2:3])
    assert got["forward_kl"].isnan() and got["reverse_kl"].isnan() and got[f"{side}_entropy"].isnan()
    assert dirty[2].isnan().all()


def test_rows_of_weight_zero_are_not_read() -> None:
    student, teacher = logits(6, 3000)
    weights = upstream(6)
    weights[1] = weights[4] = 0
    student[1], teacher[4] = math.nan, math.nan
    out = torch.full_like(student, math.nan)
    statistics, gate, loss = CPU.row_loss_and_gradient(student, teacher, weights, -math.inf, COMBINE, PLAIN, out)
    empty = torch.tensor([-math.inf, 0, -math.inf, 0, 0, 0, 0, 0])
    assert torch.equal(statistics[[1, 4]], empty.expand(2, 8))
    assert torch.equal(gate, (weights != 0).float()) and torch.equal(loss > 0, weights != 0)
    assert torch.equal(out[[1, 4]], torch.zeros(2, 3000)) and not out.isnan().any()

    a, b, c = weights, weights * 0.5, weights * -0.2
    out.fill_(math.nan)
    CPU.row_gradient(student, teacher, statistics, a, b, c, PLAIN, out)
    assert torch.equal(out[[1, 4]], torch.zeros(2, 3000)) and not out.isnan().any()


@pytest.mark.parametrize("unused", ["b", "c", "bc"])
def test_unused_terms(unused: str) -> None:
    student, teacher = logits(5, 2500)
    truth = Truth(student, teacher)
    statistics = CPU.row_statistics(student, teacher, PLAIN)
    a, b, c = torch.linspace(-0.9, 1.3, 5), torch.linspace(0.4, 2.1, 5), torch.linspace(1.2, -0.7, 5)
    b, c = b * ("b" not in unused), c * ("c" not in unused)
    out = torch.empty_like(student)
    CPU.row_gradient(student, teacher, statistics, a, b, c, PLAIN, out)
    check_gradient(out, truth.gradient(a, b, c))
    if "b" in unused:  # an infinite log-ratio is nobody's business
        teacher[:, 7] = -math.inf
        truth = Truth(student, teacher)
        statistics = CPU.row_statistics(student, teacher, PLAIN)
        CPU.row_gradient(student, teacher, statistics, a, b, c, PLAIN, out)
        check_gradient(out, truth.gradient(a, b, c))


@pytest.mark.parametrize("threshold", [-math.inf, math.inf])
def test_infinite_thresholds(threshold: float) -> None:
    student, teacher = logits(4, 1000)
    out = torch.empty_like(student)
    _, gate, _ = CPU.row_loss_and_gradient(student, teacher, upstream(4), threshold, COMBINE, PLAIN, out)
    assert torch.equal(gate, torch.full((4,), float(threshold < 0)))
    truth = Truth(student, teacher)
    check_gradient(out, truth.gradient(*truth.coefficients(gate, upstream(4), COMBINE)))


def test_no_rows_and_one_column() -> None:
    empty = torch.empty(0, 12)
    statistics, gate, _ = CPU.row_loss_and_gradient(
        empty, empty, torch.empty(0), 0.8, COMBINE, PLAIN, torch.empty(0, 12)
    )
    assert statistics.shape == (0, 8) and gate.shape == (0,)
    column = torch.tensor([[3.0], [-2.0]]).t()[:1].t()  # [2, 1] with stride 1 along the rows
    got = derived(CPU.row_statistics(column, -column, PLAIN))
    assert all(bool((got[name] == 0).all()) for name in ("teacher_entropy", "student_entropy", "forward_kl"))


def test_the_exponential_everywhere() -> None:
    """Two columns, one of them 0 and the larger: the sum minus one is e^x."""
    x = -torch.cat([torch.linspace(0, 87, 20001), torch.tensor([87.5, 88.5, 90.0, 120.0, 1e4, 1e30])])
    student = torch.stack([x, torch.zeros_like(x)], 1)
    statistics = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]).repeat(len(x), 1)
    one, none = torch.ones(len(x)), torch.zeros(len(x))
    out = torch.empty_like(student)
    CPU.row_gradient(student, student, statistics, one, none, none, PLAIN, out)
    scalar = out[:, 0]
    wide = torch.empty(1, len(x))
    CPU.row_gradient(x[None], x[None], statistics[:1], one[:1], none[:1], none[:1], PLAIN, wide)
    truth = x.double().exp()
    for got in (scalar, wide[0]):
        ulps = ((got.double() - truth) / truth).abs() / torch.finfo(torch.float32).eps
        assert ulps[x >= -20].max() <= 2 and ulps[x >= -87].max() <= 4
        assert (got[x <= -88] == 0).all()


def test_refusals() -> None:
    student, teacher = logits(3, 10)
    with pytest.raises(ValueError, match="teacher must have the student's shape"):
        CPU.row_statistics(student, teacher[:, :9], PLAIN)
    with pytest.raises(ValueError, match="student must have stride 1 along the vocabulary"):
        CPU.row_statistics(torch.empty(10, 3).t(), teacher, PLAIN)
    with pytest.raises(TypeError, match=r"teacher must be one of .*got torch.int64"):
        CPU.row_statistics(student, teacher.long(), PLAIN)
    with pytest.raises(ValueError, match=r"weights must be \[3\] of torch.float32"):
        CPU.row_loss_and_gradient(student, teacher, upstream(4), 0.8, COMBINE, PLAIN, torch.empty(3, 10))


def test_an_unknown_capability_names_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EOPD_CPU_CAPABILITY", "sse9")
    with pytest.raises(ValueError, match=r'EOPD_CPU_CAPABILITY is "sse9".*portable'):
        cpu.kernels().capability()
