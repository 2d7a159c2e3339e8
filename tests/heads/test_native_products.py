"""csrc/cpu/products.cpp: products of bfloat16 matrices with a float32 result, on processors that have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from eopd_kernels import LMHead, entropy_aware_kl
from eopd_kernels.heads import products
from tests.canaries import Guarded

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not products.widening(CPU, torch.bfloat16), reason="this processor, or build, does not multiply bfloat16"
)

# Around the tile of 8 rows and 48 columns, its registers of 16 columns, pairs, panels of 512, slices of 4,096, and the
# tasks of 288 rows that a transposed operand has.
SHAPES = [(1, 1, 1), (3, 5, 2), (8, 48, 64), (9, 49, 33), (13, 95, 31), (16, 17, 511), (7, 33, 513), (4, 2, 1025)]
SHAPES += [(5, 40, 8195), (290, 50, 6), (600, 20, 3)]
LAYOUTS = ["rows", "columns", "neither"]


def operand(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    """A bf16 matrix in the middle of NaN, contiguous along its rows, its columns, or neither."""
    steps = 2 if layout == "neither" else 1
    shape = (columns, rows) if layout == "columns" else (rows, columns)
    around = torch.full((shape[0] + 2, shape[1] * steps + 3), torch.nan, dtype=torch.bfloat16)
    inner = around[1:-1, 1 : 1 + shape[1] * steps : steps]
    inner.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return inner.t() if layout == "columns" else inner


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_exact_to_float32(shape: tuple[int, int, int], left: str, right: str, guarded: Guarded) -> None:
    rows, columns, depth = shape
    a, b = operand(rows, depth, left, 1), operand(depth, columns, right, 2)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    out = guarded((rows, columns), torch.float32, padding=3)
    products.mm(a, b, out)
    assert ((out - exact).abs() <= 1e-6 * size).all()
    products.add_mm(a, b, out)
    assert ((out - 2 * exact).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_change_nothing(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough for them to meet: 20 ms of a core."""
    a, b = operand(600, 4000, "columns" if transposed else "rows", 1), operand(4000, 1000, "rows", 2)
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.empty(600, 1000)
        products.mm(a, b, out)
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_product_of_nothing_is_zero() -> None:
    a, b, out = torch.empty(3, 0, dtype=torch.bfloat16), torch.empty(0, 2, dtype=torch.bfloat16), torch.ones(3, 2)
    products.add_mm(a, b, out)
    assert (out == 1).all()
    products.mm(a, b, out)
    assert (out == 0).all()
    products.mm(torch.empty(0, 4, dtype=torch.bfloat16), torch.empty(4, 2, dtype=torch.bfloat16), torch.empty(0, 2))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_stays_in_its_row_and_column(value: float) -> None:
    a, b = operand(9, 33, "rows", 1), operand(33, 50, "columns", 2)
    a[4, 32] = value
    out = torch.empty(9, 50)
    products.mm(a, b, out)
    assert out[4].isfinite().sum() == 0
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.filterwarnings("error")
def test_fake_tensors_have_no_memory_to_multiply(schedule: str) -> None:
    with FakeTensorMode():
        hidden, weight = (torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (5, 40))
        loss = entropy_aware_kl(hidden, torch.randn(5, 40), student_head=LMHead(weight), schedule=schedule).loss
        gradients = torch.autograd.grad(loss, (hidden, weight))
    for leaf, gradient in zip((hidden, weight), gradients, strict=True):
        assert isinstance(gradient, FakeTensor) and (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_narrower_kernels_have_none(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EOPD_CPU_CAPABILITY", capability)
    assert not products.widening(CPU, torch.bfloat16)


def test_only_bfloat16_is_multiplied_so() -> None:
    assert not products.widening(CPU, torch.float16)
