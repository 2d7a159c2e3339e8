"""``make bench-dev``: the whole loss of hidden states beside the plain one and the products, for work on schedules."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .implementations import HIDDEN, OURS, PLAIN, PRODUCTS
from .measure import THREADS
from .problems import hidden_problem


@pytest.mark.benchmark(group="hidden states N=512, V=49,152, D=576 fp32")
@pytest.mark.parametrize("name", [PRODUCTS, OURS, PLAIN])
def test_fp32(benchmark: BenchmarkFixture, name: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark.pedantic(HIDDEN[name].step(hidden_problem(512, 49_152, 576)), rounds=4, warmup_rounds=1)


@pytest.mark.benchmark(group="hidden states N=128, V=32,768, D=576 bf16")
@pytest.mark.parametrize("name", [OURS, PLAIN])
def test_bf16(benchmark: BenchmarkFixture, name: str) -> None:
    torch.set_num_threads(THREADS)
    problem = hidden_problem(128, 32_768, 576, torch.bfloat16)
    benchmark.pedantic(HIDDEN[name].step(problem), rounds=3, warmup_rounds=1)
