"""``pytest benchmarks --benchmark-only``: the contenders on hidden states, ratios within the group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import THREADS
from .problems import HiddenProblem, hidden_problem
from .steps import Step, chunk_tokens, fused_hidden, plain_hidden, products

CONTENDERS: dict[str, Callable[[HiddenProblem], Step]] = {
    "four products": lambda problem: products(problem, chunk_tokens(problem)),
    "entropy_aware_kl": fused_hidden,
    "plain": plain_hidden,
}


@pytest.mark.benchmark(group="hidden states N=512, V=49,152, D=576 fp32")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_fp32(benchmark: BenchmarkFixture, contender: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark.pedantic(CONTENDERS[contender](hidden_problem(512, 49_152, 576)), rounds=4, warmup_rounds=1)


@pytest.mark.benchmark(group="hidden states N=128, V=32,768, D=576 bf16")
@pytest.mark.parametrize("contender", ["entropy_aware_kl", "plain"])
def test_bf16(benchmark: BenchmarkFixture, contender: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark.pedantic(
        CONTENDERS[contender](hidden_problem(128, 32_768, 576, torch.bfloat16)), rounds=3, warmup_rounds=1
    )
