"""How rows are shared out, by arithmetic: against the extension's own, and against what the GPUs' data sheets allow."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from eopd_kernels.backends import cuda
from eopd_kernels.backends.cuda.plan import NOTHING, PREFERENCES, REGISTERS, SHARED, Plan, Row, resident, streaming
from eopd_kernels.backends.native import DTYPE_CODES
from eopd_kernels.testing.data_sheets import DEVICES, VOCABULARIES

A100, H100, B200, RTX = (DEVICES[name] for name in ("A100", "H100", "B200", "RTX 5090"))
WIDTHS = {4: torch.float32, 2: torch.bfloat16}
emulated = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))


@emulated
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 5003, 32_000, 151_936])
@pytest.mark.parametrize(("student", "teacher"), list(product(WIDTHS, WIDTHS)))
def test_the_extension_takes_the_shared_memory_that_was_planned(vocab_size: int, student: int, teacher: int) -> None:
    row = Row(vocab_size, student, teacher)
    codes = DTYPE_CODES[WIDTHS[student]], DTYPE_CODES[WIDTHS[teacher]]
    for kept, cluster in PREFERENCES:
        plan = Plan(kept, cluster, 192)
        if plan.holds(row):
            assert cuda.kernels().shared_bytes(*codes, vocab_size, plan.arguments) == plan.shared_bytes(row)
        else:
            with pytest.raises(ValueError, match="registers hold"):
                cuda.kernels().shared_bytes(*codes, vocab_size, plan.arguments)


@emulated
def test_a_place_that_is_not_there_is_refused() -> None:
    for codes, kept in (((0, 0), 3), ((0, 0), -1), ((3, 0), SHARED)):
        with pytest.raises(ValueError, match="cannot be kept"):
            cuda.kernels().shared_bytes(*codes, 100, Plan(kept, 1, 192).arguments)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_two_clusters_share_a_multiprocessor_of_an_h100(vocab_size: int, itemsize: int) -> None:
    for device in (H100, B200):
        row = Row(vocab_size, itemsize, itemsize)
        plan = resident(row, device)
        assert plan is not None
        assert 2 * (plan.shared_bytes(row) + device.shared_reserved) <= device.shared_per_multiprocessor
        assert plan.per_multiprocessor(row, device) == 2


def test_the_smallest_sufficient_cluster_is_taken() -> None:
    assert resident(Row(1000, 4, 4), H100) == Plan(SHARED, 1, 320)
    assert resident(Row(32_000, 4, 4), H100) == Plan(SHARED, 4, 320)
    assert resident(Row(151_936, 2, 2), H100) == Plan(SHARED, 8, 320)


def test_registers_keep_a_side_where_shared_memory_is_short() -> None:
    assert resident(Row(128_256, 4, 4), RTX) == Plan(REGISTERS, 8, 192)
    assert resident(Row(262_144, 4, 4), H100) == Plan(REGISTERS, 16, 192)
    # 16 CTAs are not granted everywhere.
    assert resident(Row(151_936, 4, 4), H100) == Plan(SHARED, 16, 320)
    assert resident(Row(151_936, 4, 4), replace(H100, largest_cluster=8)) == Plan(REGISTERS, 8, 192)


def test_what_no_cluster_keeps_is_streamed() -> None:
    assert resident(Row(1_000_000, 4, 4), H100) is None
    assert resident(Row(1000, 4, 4), A100) is None
    assert resident(Row(1000, 8, 4), H100) is None
    assert resident(Row(262_144, 4, 4), RTX) is None


def test_few_rows_are_split() -> None:
    assert streaming(8192, 151_936, H100) == Plan(NOTHING, 1, 320)
    assert streaming(1, 151_936, H100) == Plan(NOTHING, 8, 320)
    assert streaming(40, 151_936, H100) == Plan(NOTHING, 2, 320)
    assert streaming(1, 5000, H100) == Plan(NOTHING, 1, 320)
    assert streaming(1, 151_936, A100) == Plan(NOTHING, 1, 320)
