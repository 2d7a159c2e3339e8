"""The tests' own tools: ranks that fail or hang are noticed, and traffic is counted."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.distributed.processes import run_ranks
from tests.distributed.traffic import Traffic


def summed() -> tuple[int, float, dict[str, int]]:
    numbers = torch.full((3, 2), dist.get_rank() + 1.0)
    with Traffic() as traffic:
        dist.all_reduce(numbers)
        gathered = [torch.empty(3, 2), torch.empty(3, 2)]
        dist.all_gather(gathered, numbers)
    return dist.get_rank(), float(torch.stack(gathered).sum()), dict(traffic.bytes)


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("rank 1 has had enough")
    time.sleep(60)


def hangs() -> None:
    time.sleep(60)


def test_results_come_back_by_rank_and_traffic_is_counted() -> None:
    results = run_ranks(2, summed)
    assert [rank for rank, _, _ in results] == [0, 1]
    for _, total, traffic in results:
        assert total == 2 * 6 * 3.0
        assert traffic == {"allreduce_": 24, "allgather_": 24}


def test_a_failing_rank_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="rank 1 has had enough"):
        run_ranks(2, fails_on_rank_1)
    assert time.monotonic() - started < 40


def test_a_hanging_rank_is_noticed() -> None:
    with pytest.raises(TimeoutError, match="2 ranks of hangs did not end within 3 s"):
        run_ranks(2, hangs, timeout=3.0)
