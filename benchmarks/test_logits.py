"""``pytest benchmarks --benchmark-only``: the contenders on logits, ratios within the group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import THREADS
from .problems import LogitsProblem, logits_problem
from .steps import Step, fused_logits, plain_logits, row_kernel


def adding(problem: LogitsProblem) -> Step:
    a, b, c = problem.student.detach(), problem.teacher, torch.zeros_like(problem.teacher)
    return lambda: torch.add(a, b, out=c)


CONTENDERS: dict[str, Callable[[LogitsProblem], Step]] = {
    "torch.add": adding,
    "row kernel": lambda problem: row_kernel(problem, torch.zeros_like(problem.teacher)),
    "entropy_aware_kl": fused_logits,
    "plain compiled": lambda problem: plain_logits(problem, compiled=True),
    "plain": plain_logits,
}


@pytest.mark.benchmark(group="logits 64 x 151,936 fp32")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_logits(benchmark: BenchmarkFixture, contender: str) -> None:
    torch.set_num_threads(THREADS)
    step = CONTENDERS[contender](logits_problem(64, 151_936))
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
