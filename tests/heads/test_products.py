"""The product of hidden states and head in pieces: the same numbers, and how many pieces there are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eopd_kernels.heads import products
from eopd_kernels.testing import pretend
from tests.conftest import relative_error


def shapes(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> list[int]:
    """The columns of each product."""
    seen: list[int] = []

    def formula(a: tuple[int, int], b: tuple[int, int], *_: object, **__: object) -> int:
        seen.append(b[1])
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: formula}):
        products.project(hidden, weight, out)
    return seen


@pytest.mark.parametrize("vocab_size", [0, 1, 6, 7, 13, 21])
def test_logits_in_pieces_are_the_logits(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "HOST_COLUMNS", 7)
    hidden, weight = torch.randn(5, 4), torch.randn(vocab_size, 4)
    block = torch.full((5, vocab_size + 3), torch.nan)
    pieces = shapes(hidden, weight, block[:, :vocab_size])
    assert pieces == [7] * (vocab_size // 7) + [vocab_size % 7] * (vocab_size % 7 > 0)
    assert block[:, vocab_size:].isnan().all()
    if vocab_size:
        assert relative_error(block[:, :vocab_size], hidden.double() @ weight.double().t()) < 1e-6


def test_a_gpu_makes_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "HOST_COLUMNS", 7)
    with pretend.gpu():
        assert shapes(torch.randn(5, 4), torch.randn(21, 4), torch.empty(5, 21)) == [21]


@pytest.mark.parametrize("there", [True, False])
def test_a_device_other_than_cuda_is_asked_once(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        asked.append((a.dtype, out.dtype))
        if not there:
            raise RuntimeError("gemm input type BFloat16 and output type Float is not supported")

    monkeypatch.setattr(products, "mm", product)
    monkeypatch.setattr(products, "add_mm", product)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    products.found_widening.cache_clear()
    with pretend.gpu():
        assert [products.widening(torch.device("cpu"), torch.bfloat16) for _ in range(3)] == [there] * 3
    assert asked == [(torch.bfloat16, torch.float32)] * (2 if there else 1)
    products.found_widening.cache_clear()
