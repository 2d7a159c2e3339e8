"""``make bench-dev``: the row functions and the whole loss beside their peers, for work on kernels and schedules."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from eopd_kernels.rows import choose

from .contenders import ADD, COMPILED, HIDDEN, LOGITS, OURS, PLAIN, PRODUCTS
from .measure import THREADS
from .problems import Shape, hidden_problem, logits_problem
from .steps import TRANSFORMS, row_kernel


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.mark.benchmark(group="row functions, 64 x 151,936 fp32")
@pytest.mark.parametrize("name", ["row_statistics", "row_gradient", "row_loss_and_gradient"])
def test_rows(benchmark: BenchmarkFixture, name: str) -> None:
    """All coefficients of the gradient are 1, so that nothing is left out."""
    problem = logits_problem(64, 151_936)
    functions, student = choose("auto", problem.student.device), problem.student.detach()
    out, ones = torch.zeros_like(problem.teacher), torch.ones(len(student))
    sides = student, problem.teacher
    statistics = functions.row_statistics(*sides, TRANSFORMS)
    steps = {
        "row_statistics": lambda: functions.row_statistics(*sides, TRANSFORMS),
        "row_gradient": lambda: functions.row_gradient(*sides, statistics, ones, ones, ones, TRANSFORMS, out),
        "row_loss_and_gradient": row_kernel(problem),
    }
    benchmark.pedantic(steps[name], rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group="logits 64 x 151,936 fp32")
@pytest.mark.parametrize("name", [ADD, OURS, COMPILED, PLAIN])
def test_logits(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.pedantic(LOGITS[name].step(logits_problem(64, 151_936)), rounds=7, warmup_rounds=2)


@pytest.mark.benchmark(group="hidden states N=512, V=49,152, D=576 fp32")
@pytest.mark.parametrize("name", [PRODUCTS, OURS, PLAIN])
def test_hidden_fp32(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.pedantic(HIDDEN[name].step(hidden_problem(Shape(512, 49_152, 576, 576))), rounds=4, warmup_rounds=1)


@pytest.mark.benchmark(group="hidden states N=128, V=32,768, D=576 bf16")
@pytest.mark.parametrize("name", [OURS, PLAIN])
def test_hidden_bf16(benchmark: BenchmarkFixture, name: str) -> None:
    problem = hidden_problem(Shape(128, 32_768, 576, 576), torch.bfloat16)
    benchmark.pedantic(HIDDEN[name].step(problem), rounds=3, warmup_rounds=1)
