"""What only the CUDA backend has to answer for: clusters of every size, rows kept in every place, any order of threads.

The kernels run on fibres (csrc/emulation). The oracle of tests/test_rows.py and tests/test_oracle.py runs on them as on
every backend, with the plans that an emulated device asks for; here the plans are forced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from eopd_kernels.backends import cuda as backend
from eopd_kernels.backends.cuda.plan import KEPT, NOTHING, REGISTERS, SHARED, Plan
from eopd_kernels.row_math.statistics import RowStatistics
from eopd_kernels.rows import FUNCTIONS
from eopd_kernels.testing.emulation import count_traffic
from tests.canaries import Guarded
from tests.conftest import relative_error
from tests.test_rows import ADD, IDENTITY, TRANSFORMS, block, random_coefficients

pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
CUDA, TORCH = FUNCTIONS["cuda"], FUNCTIONS["torch"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLUSTERS = [1, 2, 4, 8]
PLACES = [NOTHING, SHARED, REGISTERS]
WEIGHTS = torch.tensor([0.3, 0.0, -1.2, 1.0, 2.5])


@contextmanager
def planned(kept: int, cluster: int, seed: int = 0, threads: int = 64) -> Iterator[None]:
    """Within it every row is kept and shared out like this, and the threads run in the order of a seed."""
    backend.kernels().set_seed(seed)
    with (
        mock.patch.object(backend, "resident_or_streaming", lambda *blocks: Plan(kept, cluster, threads)),
        mock.patch.object(backend, "one_visit", lambda block: Plan(NOTHING, cluster, threads)),
    ):
        yield
    backend.kernels().set_seed(0)


class Results(NamedTuple):
    statistics: Tensor
    gate: Tensor
    loss: Tensor
    gradient: Tensor
    alone: Tensor  # row_statistics by itself
    again: Tensor  # row_gradient by itself


def solve(functions: object, student: Tensor, teacher: Tensor, transforms: list[float], out: torch.dtype) -> Results:
    """All three functions; the gate is open on some of the rows."""
    gradient, again = torch.empty(student.shape, dtype=out), torch.empty(student.shape, dtype=out)
    weights = WEIGHTS[: len(student)]
    statistics, gate, loss = functions.row_loss_and_gradient(  # type: ignore[attr-defined]
        student, teacher, weights, 3.0, list(ADD), transforms, gradient
    )
    alone = functions.row_statistics(student, teacher, transforms)  # type: ignore[attr-defined]
    coefficients = random_coefficients(len(student), torch.float32)
    functions.row_gradient(student, teacher, alone, *coefficients, transforms, again)  # type: ignore[attr-defined]
    return Results(statistics, gate, loss, gradient, alone, again)


def solve_mixture(
    functions: object, student: Tensor, teacher: Tensor, transforms: list[float], out: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both functions of skewed divergences; a row without coefficients is among the others."""
    packed = TORCH.row_statistics(student, teacher, transforms)
    mixture = functions.row_mixture(student, teacher, packed, [0.3, 0.1], transforms)  # type: ignore[attr-defined]
    coefficients = [k * (WEIGHTS[: len(student)] != 0) for k in random_coefficients(len(student), torch.float32)]
    gradient = torch.empty(student.shape, dtype=out)
    functions.row_mixture_gradient(  # type: ignore[attr-defined]
        student, teacher, packed, *coefficients, [0.3, 0.1], transforms, gradient
    )
    return mixture, gradient


def assert_close(ours: Results, truth: Results, tolerance: float) -> None:
    assert torch.equal(ours.gate, truth.gate)
    read = WEIGHTS[: len(ours.gate)] != 0
    assert torch.equal(ours.statistics[~read], truth.statistics[~read])
    for name in ("statistics", "alone"):
        value, exact = getattr(ours, name)[read], getattr(truth, name)[read]
        assert max(relative_error(value[:, i], exact[:, i]) for i in range(8)) < 3e-5, name
    assert (ours.loss[~read] == 0).all() and relative_error(ours.loss, truth.loss) < 3e-5
    assert relative_error(ours.gradient, truth.gradient) < tolerance
    assert relative_error(ours.again, truth.again) < tolerance


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")], ids=str)
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_every_place_and_cluster(kept: int, cluster: int, dtypes: tuple[str, str], transforms: list[float]) -> None:
    # 6,100 columns of a float32 teacher reach the last registers of 64 threads, whichever the student.
    for seed, vocab_size in enumerate((1, 7, 8, 257, 2051, 5003, 6100)):
        student, teacher = (x.to(DTYPES[name]) for x, name in zip(block(5, vocab_size, seed=seed), dtypes, strict=True))
        truth = solve(TORCH, student, teacher, transforms, torch.float32)
        with planned(kept, cluster, seed):
            assert_close(solve(CUDA, student, teacher, transforms, torch.float32), truth, 3e-5)
            narrow = solve(CUDA, student, teacher, transforms, torch.float16)
            assert_close(narrow, truth, 3e-5 + 2**-11)


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")], ids=str)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_mixtures_on_every_cluster(cluster: int, dtypes: tuple[str, str], transforms: list[float]) -> None:
    for seed, vocab_size in enumerate((1, 7, 8, 257, 2051, 6100)):
        student, teacher = (x.to(DTYPES[name]) for x, name in zip(block(5, vocab_size, seed=seed), dtypes, strict=True))
        truth = solve_mixture(TORCH, student, teacher, transforms, torch.float32)
        with planned(NOTHING, cluster, seed):
            ours = solve_mixture(CUDA, student, teacher, transforms, torch.float32)
            narrow = solve_mixture(CUDA, student, teacher, transforms, torch.float16)
        torch.testing.assert_close(ours[0], truth[0], rtol=3e-5, atol=3e-6)
        assert relative_error(ours[1], truth[1]) < 3e-5 and (ours[1][1] == 0).all()
        assert relative_error(narrow[1], truth[1]) < 3e-5 + 2**-11


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_order_of_threads_changes_no_bit_of_a_mixture(cluster: int) -> None:
    student, teacher = block(5, 3001)
    results = []
    for seed in range(4):
        with planned(NOTHING, cluster, seed, threads=96):
            results.append(solve_mixture(CUDA, student, teacher, IDENTITY, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mixture_reads_each_logit_once(dtype: torch.dtype) -> None:
    """On each of its two visits; the gradient's passes over the row without coefficients."""
    student, teacher = block(5, 4096, dtype)
    native = backend.kernels()
    with planned(NOTHING, 2):
        native.reset_counters()
        solve_mixture(CUDA, student, teacher, IDENTITY, dtype)
    counted, row = native.counters(), 4096 * dtype.itemsize
    assert counted["logit_bytes"] == 2 * (5 + 4) * row and counted["scalar_loads"] == 0
    assert counted["gradient_bytes"] == 5 * row


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_the_order_of_threads_changes_no_bit(kept: int, cluster: int) -> None:
    student, teacher = block(5, 3001)
    results = []
    for seed in range(4):
        with planned(kept, cluster, seed, threads=96):
            results.append(solve(CUDA, student, teacher, IDENTITY, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("out_offset", [0, 1, 4])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (3, 0), (0, 6), (5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_any_alignment(
    guarded: Guarded, kept: int, dtype: torch.dtype, offsets: tuple[int, int], out_offset: int
) -> None:
    """Each matrix begins somewhere else, and so does each row: 1,311 is odd."""
    student, teacher = block(4, 1301, dtype)
    views, beside = [], []
    for x, offset in ((student, offsets[0]), (teacher, offsets[1]), (torch.zeros_like(student), out_offset)):
        whole = guarded((4, 1311), dtype).fill_(7.0)
        views.append(whole[:, offset : offset + 1301].copy_(x))
        beside += [whole[:, :offset], whole[:, offset + 1301 :]]
    weights = guarded.holding(WEIGHTS[:4])
    expected = torch.empty_like(student)
    TORCH.row_loss_and_gradient(student, teacher, WEIGHTS[:4], 3.0, list(ADD), IDENTITY, expected)
    with planned(kept, 2):
        CUDA.row_loss_and_gradient(views[0], views[1], weights, 3.0, list(ADD), IDENTITY, views[2])
    assert relative_error(views[2], expected) < 3e-5 + (0 if dtype == torch.float32 else 2**-8)
    assert torch.equal(views[0], student) and torch.equal(views[1], teacher)
    assert all((columns == 7).all() for columns in beside), "wrote beside its rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("vocab_size", "padding"), [(1, 0), (300, 0), (1024, 8), (2049, 3)])
def test_nothing_is_written_beside_a_tensor(
    guarded: Guarded, vocab_size: int, padding: int, dtype: torch.dtype
) -> None:
    inputs = block(5, vocab_size, dtype)
    student, teacher = (guarded.holding(x, padding) for x in inputs)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for kept in PLACES if compute == torch.float32 else [NOTHING]:
        weights = guarded.holding(WEIGHTS.to(compute))
        out, again = (guarded((5, vocab_size), kind, padding) for kind in (dtype, compute))
        a, b, c = (guarded.holding(k) for k in random_coefficients(5, compute))
        with planned(kept, 4):
            CUDA.row_loss_and_gradient(student, teacher, weights, 1.0, list(ADD), IDENTITY, out)
            statistics = CUDA.row_statistics(student, teacher, IDENTITY)
            CUDA.row_gradient(student, teacher, statistics, a, b, c, IDENTITY, again)
            if kept == NOTHING:
                numbers, out = guarded.holding(statistics), guarded((5, vocab_size), dtype, padding)
                CUDA.row_mixture(student, teacher, numbers, [0.2, 0.0], IDENTITY)
                CUDA.row_mixture_gradient(student, teacher, numbers, a, b, c, [0.2, 0.0], IDENTITY, out)
    assert torch.equal(student, inputs[0]) and torch.equal(teacher, inputs[1])


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_a_part_of_a_row_without_mass(kept: int, cluster: int) -> None:
    """Whole CTAs see −inf only, on one side or on both; a padded vocabulary is that."""
    for dead in (slice(0, 2048), slice(1024, 4096), slice(3000, 4096)):
        for sides in ((0,), (1,), (0, 1)):
            blocks = block(3, 4096)
            for side in sides:
                blocks[side][:, dead] = -math.inf
            with planned(kept, cluster):
                packed, _, _ = CUDA.row_loss_and_gradient(
                    *blocks, WEIGHTS[2:], 3.0, list(ADD), IDENTITY, torch.empty(3, 4096)
                )
            ours, exact = RowStatistics(packed), RowStatistics.of(*(x.double() for x in blocks))
            for name in ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl"):
                value, truth = getattr(ours, name), getattr(exact, name)
                assert torch.equal(value.isposinf(), truth.isposinf()) and not value.isnan().any(), name
                assert relative_error(value[truth.isfinite()], truth[truth.isfinite()]) < 1e-4, name


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize(("logits", "gradient"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_a_row_that_is_kept_is_read_once(vocab_size: int, logits: str, gradient: str) -> None:
    """The compulsory traffic, with the plans of an H100; and two visits read twice."""
    itemsizes = DTYPES[logits].itemsize, DTYPES[gradient].itemsize
    for keeps, visits in ((True, 1), (False, 2)):
        counted = count_traffic(vocab_size, DTYPES[logits], DTYPES[gradient], "H100", keeps)
        assert (counted.plan.kept == NOTHING) == (not keeps)
        assert counted.loads == visits * 2 * itemsizes[0] and counted.stores == itemsizes[1]
        assert counted.scalar_loads == 0


def test_rows_of_an_odd_vocabulary_are_loaded_as_vectors_too() -> None:
    """V = 50,257 without padding: each row begins at another address, head and tail are all that is loaded singly."""
    counted = count_traffic(50_257, torch.bfloat16, torch.bfloat16, "H100")
    assert 0 < counted.scalar_loads <= 2 * 2 * 2 * 14


def test_a_launch_that_fails_names_its_kernel() -> None:
    student, teacher = block(2, 100)
    with planned(SHARED, 1, threads=48), pytest.raises(RuntimeError, match="row_loss_and_gradient: a CTA has whole"):
        CUDA.row_loss_and_gradient(student, teacher, WEIGHTS[:2], 1.0, list(ADD), IDENTITY, torch.empty_like(student))


def test_a_wider_gradient_than_its_logits_is_refused() -> None:
    """It was written as 16 bits."""
    student, teacher = block(2, 100)
    out = torch.empty(2, 100, dtype=torch.float64)
    with planned(SHARED, 1), pytest.raises(ValueError, match="a gradient in float64 wants a side in float64"):
        CUDA.row_loss_and_gradient(student, teacher, WEIGHTS[:2], 1.0, list(ADD), IDENTITY, out)


@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_a_negative_scale(kept: int) -> None:
    """The largest logit is the smallest of what is read."""
    student, teacher = block(5, 2051)
    transforms = [-1.5, 0.0, 2.0, -0.7, 0.0, 1.0]
    with planned(kept, 2):
        ours = solve(CUDA, student, teacher, transforms, torch.float32)
    assert_close(ours, solve(TORCH, student, teacher, transforms, torch.float32), 3e-5)


@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("kept", PLACES, ids=KEPT.get)
def test_a_student_near_its_teacher(kept: int, shift: float) -> None:
    """A KL of some 2e-4 nats, with rising logits, so that centres move, and far from 0."""
    _, teacher = block(5, 4096, seed=3)
    teacher = teacher + torch.linspace(0, 12, 4096)
    student = teacher + 0.02 * torch.randn(5, 4096, generator=torch.Generator().manual_seed(5))
    student, teacher = student + shift, teacher + shift
    with planned(kept, 2):
        packed, _, _ = CUDA.row_loss_and_gradient(
            student, teacher, WEIGHTS, 3.0, list(ADD), IDENTITY, torch.empty(5, 4096)
        )
    read = WEIGHTS != 0
    exact = RowStatistics.of(student[read].double(), teacher[read].double())
    ours = RowStatistics(packed[read])
    for name in ("forward_kl", "reverse_kl"):
        assert 1e-4 < getattr(exact, name).min() and getattr(exact, name).max() < 4e-4
        assert relative_error(getattr(ours, name), getattr(exact, name)) < 1e-3, name
    assert relative_error(ours.teacher_entropy, exact.teacher_entropy) < 1e-6


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("student must be \\[n, V\\]", lambda s, t: (s[0], t[0], WEIGHTS[:3], s)),
        ("teacher must be one of", lambda s, t: (s, t.int(), WEIGHTS[:3], s)),
        ("student must have stride 1", lambda s, t: (s[:, ::2], t[:, ::2], WEIGHTS[:3], s)),
        ("weights must be \\[3\\] of torch.float32", lambda s, t: (s, t, WEIGHTS[:4], s)),
        ("out must have the student's shape", lambda s, t: (s, t, WEIGHTS[:3], s[:, :9])),
    ],
)
def test_what_the_kernels_would_misread_is_refused(message: str, arguments: object) -> None:
    student, teacher, weights, out = arguments(*block(3, 10))  # type: ignore[operator]
    with pytest.raises((TypeError, ValueError), match=message):
        CUDA.row_loss_and_gradient(student, teacher, weights, 0.8, list(ADD), IDENTITY, out)
