"""The k largest of each row: the same entries as torch.topk finds, with the row read once."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eopd_kernels.row_math.top_k import GROUP, top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("width", [16, 40 * GROUP, 40 * GROUP + 1, 41 * GROUP - 1])
def test_the_entries_of_torch(width: int, k: int, dtype: torch.dtype) -> None:
    rows = torch.randn(20, width + 3, generator=torch.Generator().manual_seed(k)).to(dtype)[:, 1:-2]
    values, columns = top_k(rows, k)
    assert torch.equal(values, rows.topk(k, 1).values)
    assert torch.equal(rows.gather(1, columns), values)
    assert all(len(set(row.tolist())) == k for row in columns)


def test_all_of_them_in_one_group_and_at_the_ragged_end() -> None:
    rows = torch.randn(4, 40 * GROUP + 50, generator=torch.Generator().manual_seed(0))
    rows[0, 7 * GROUP : 7 * GROUP + 16] += 50
    rows[1, -20:] += 50
    rows[2] = -math.inf
    rows[2, 5 :: 7 * GROUP] = 1.0
    values, columns = top_k(rows, 16)
    assert torch.equal(values, rows.topk(16, 1).values)
    assert set(columns[0].tolist()) == set(range(7 * GROUP, 7 * GROUP + 16))


def test_a_long_row_is_read_once() -> None:
    rows = torch.randn(4, 150_000)
    read: list[int] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.is_view or func is torch.ops.aten.gather.default:
                return func(*args, **(kwargs or {}))
            read.extend(a.numel() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
            return func(*args, **(kwargs or {}))

    with Reads():
        top_k(rows, 16)
    assert sum(read) < 1.05 * rows.numel()
