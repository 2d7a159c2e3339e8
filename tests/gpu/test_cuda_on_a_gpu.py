"""What the emulation of the CUDA kernels cannot vouch for: hardware, its limits, its streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from eopd_kernels.backends import cuda as backend
from eopd_kernels.backends.cuda.plan import KEPT, NOTHING, PREFERENCES, SHARED, THREADS, Plan, Row, threads
from eopd_kernels.rows import FUNCTIONS
from tests.conftest import relative_error
from tests.test_rows import ADD, IDENTITY, TRANSFORMS, block, random_coefficients

pytestmark = pytest.mark.gpu
CUDA, TORCH = FUNCTIONS["cuda"], FUNCTIONS["torch"]
PLACES = [(NOTHING, 1), *PREFERENCES]


@pytest.fixture(autouse=True)
def available(cuda: torch.device) -> None:
    if backend.unavailable() is not None or not backend.takes(cuda):
        pytest.skip(f"no CUDA kernels: {backend.unavailable()}")


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    with mock.patch.object(backend, "resident_or_streaming", lambda *blocks: plan):
        yield


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5003, 32_000, 151_936])
@pytest.mark.parametrize(("kept", "cluster"), PLACES, ids=[f"{KEPT[kept]}, {cluster}" for kept, cluster in PLACES])
def test_every_place_and_cluster(
    kept: int, cluster: int, vocab_size: int, dtype: torch.dtype, transforms: list[float], cuda: torch.device
) -> None:
    device, row = backend.device_on(backend.index_of(cuda)), Row(vocab_size, dtype.itemsize, dtype.itemsize)
    plan = Plan(kept, cluster, threads(kept, device))
    if kept != NOTHING and (device.capability < (9, 0) or plan.per_multiprocessor(row, device) == 0):
        pytest.skip("does not fit on this device")
    student, teacher = (x.to(cuda) for x in block(7, vocab_size, dtype))
    weights = torch.tensor([0.3, 0.0, -1.2, 1.0, 2.5, 0.7, 1.1], device=cuda)
    expected, out = torch.empty_like(student), torch.empty_like(student)
    truth, gate, exact = TORCH.row_loss_and_gradient(student, teacher, weights, 3.0, list(ADD), transforms, expected)
    with planned(plan):
        ours, opened, loss = CUDA.row_loss_and_gradient(student, teacher, weights, 3.0, list(ADD), transforms, out)
        in_place = student.clone()
        CUDA.row_loss_and_gradient(in_place, teacher, weights, 3.0, list(ADD), transforms, in_place)
    assert torch.equal(opened, gate) and relative_error(loss, exact) < 3e-5
    read = weights != 0
    assert max(relative_error(ours[read, i], truth[read, i]) for i in range(8)) < 3e-5
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    assert relative_error(out, expected) < 3e-5 + rounding
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("transforms", [IDENTITY, TRANSFORMS[3]], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 300])
def test_mixtures(rows: int, dtype: torch.dtype, transforms: list[float], cuda: torch.device) -> None:
    """Few rows, which clusters share, and many."""
    student, teacher = (x.to(cuda) for x in block(rows, 50_257, dtype))
    statistics = TORCH.row_statistics(student, teacher, transforms)
    coefficients = [k.to(cuda) for k in random_coefficients(rows, torch.float32)]
    results = []
    for functions in (backend, TORCH):
        out = torch.empty_like(student)
        mixture = functions.row_mixture(student, teacher, statistics, [0.3, 0.1], transforms)
        functions.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.3, 0.1], transforms, out)
        results.append((mixture, out))
    (ours, out), (truth, expected) = results
    torch.testing.assert_close(ours, truth, rtol=3e-5, atol=3e-6)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    assert relative_error(out, expected) < 3e-5 + rounding


def test_a_launch_that_fails_names_its_kernel(cuda: torch.device) -> None:
    student, teacher = (x.to(cuda) for x in block(2, 151_936))
    weights, out = torch.ones(2, device=cuda), torch.empty_like(student)
    with planned(Plan(SHARED, 1, THREADS[SHARED])), pytest.raises(RuntimeError, match="row_loss_and_gradient"):
        CUDA.row_loss_and_gradient(student, teacher, weights, 3.0, list(ADD), IDENTITY, out)
    statistics = CUDA.row_statistics(student, teacher, IDENTITY)  # the next call is none the worse
    assert statistics.isfinite().all()


def test_it_runs_on_the_stream_of_the_moment(cuda: torch.device) -> None:
    """Behind a long product on a stream of its own the kernel sees what that stream has written."""
    student, teacher = (x.to(cuda) for x in block(64, 32_000))
    expected = CUDA.row_statistics(student, teacher, IDENTITY)
    late = torch.zeros_like(student)
    factor = torch.randn(8192, 8192, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            factor = factor @ factor / 8192
        late.copy_(student)
        statistics = CUDA.row_statistics(late, teacher, IDENTITY)
    torch.cuda.synchronize()
    assert torch.equal(statistics, expected)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = (x.to("cuda:1") for x in block(7, 5003))
    statistics = CUDA.row_statistics(student, teacher, IDENTITY)
    assert torch.cuda.current_device() == 0
    assert relative_error(statistics.cpu(), TORCH.row_statistics(student.cpu(), teacher.cpu(), IDENTITY)) < 3e-5


def test_the_device_says_what_the_plans_assume(cuda: torch.device) -> None:
    device = backend.device_on(backend.index_of(cuda))
    assert device.capability == torch.cuda.get_device_capability(cuda)
    assert device.largest_cluster >= (8 if device.capability >= (9, 0) else 1)
    assert device.shared_reserved >= 0 and device.shared_per_block < device.shared_per_multiprocessor
