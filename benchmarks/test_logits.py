"""``make bench-dev``: the row functions, and the whole loss of logits, for work on the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from eopd_kernels.rows import choose

from .implementations import ADD, COMPILED, LOGITS, OURS, PLAIN
from .measure import THREADS
from .problems import LogitsProblem, logits_problem
from .steps import TRANSFORMS, Step, row_kernel


def row_statistics(problem: LogitsProblem) -> Step:
    functions = choose("auto", problem.student.device)
    student = problem.student.detach()
    return lambda: functions.row_statistics(student, problem.teacher, TRANSFORMS)


def row_gradient(problem: LogitsProblem) -> Step:
    """Into an output that exists already; with all coefficients 1, so that nothing is left out."""
    functions = choose("auto", problem.student.device)
    student, out = problem.student.detach(), torch.zeros_like(problem.teacher)
    statistics = functions.row_statistics(student, problem.teacher, TRANSFORMS)
    ones = torch.ones(len(student))
    return lambda: functions.row_gradient(student, problem.teacher, statistics, ones, ones, ones, TRANSFORMS, out)


ROW_FUNCTIONS: dict[str, Callable[[LogitsProblem], Step]] = {
    "row_statistics": row_statistics,
    "row_gradient": row_gradient,
    "row_loss_and_gradient": row_kernel,
}


@pytest.mark.benchmark(group="row functions, 64 x 151,936 fp32")
@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows(benchmark: BenchmarkFixture, name: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark.pedantic(ROW_FUNCTIONS[name](logits_problem(64, 151_936)), rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group="logits 64 x 151,936 fp32")
@pytest.mark.parametrize("name", [ADD, OURS, COMPILED, PLAIN])
def test_logits(benchmark: BenchmarkFixture, name: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark.pedantic(LOGITS[name].step(logits_problem(64, 151_936)), rounds=7, warmup_rounds=2)
