"""The counter counts what a known kernel moves, products what torch's own counter says, and the targets hold."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from benchmarks.contenders import Contender, ours
from benchmarks.problems import Shape, hidden_problem
from benchmarks.traffic.__main__ import bytes_table, kernels_table, model_table
from benchmarks.traffic.contenders import CHUNKED, ENTRIES, Entry, count
from benchmarks.traffic.counter import Operations, Traffic, counting
from benchmarks.traffic.model import GPUS, PUBLISHED, l2_share, seconds

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(tokens=8, vocab=1_300, student_dim=24, teacher_dim=40)
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the counter lives in Triton's interpreter",
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masked_lanes_are_not_counted(dtype: torch.dtype) -> None:
    from tests.benchmarks.toy_kernels import double_kernel

    x, out = torch.ones(8, 1_300), torch.empty(8, 1_300, dtype=dtype)
    with counting(SHAPE) as traffic:
        double_kernel[(8,)](x, out, 1_300, BLOCK=1024)
    assert (out == 2).all()
    assert traffic.loads == {"double_kernel": x.nbytes} and traffic.stores == {"double_kernel": out.nbytes}
    assert traffic.rest == traffic.torch_bytes == traffic.product_bytes == 0


@interpreted
def test_what_is_not_a_block_is_counted_apart() -> None:
    from tests.benchmarks.toy_kernels import scale_rows_kernel

    x, factors = torch.ones(8, 1_300), torch.arange(8.0)
    with counting(SHAPE) as traffic:
        scale_rows_kernel[(8,)](x, factors, 1_300, BLOCK=2048)
    assert traffic.loads == traffic.stores == {"scale_rows_kernel": x.nbytes}
    assert traffic.rest == factors.nbytes


def test_operations_of_torch() -> None:
    block, weight = torch.ones(8, 1_300), torch.ones(1_300, 24)
    traffic = Traffic(SHAPE)
    with Operations(traffic):
        out = torch.empty_like(block)
        torch.mul(block, 2, out=out)  # read, written
        out.mul_(2)  # read, written
        out.copy_(block)  # read, written
        out.zero_()  # written
        block[2:].t()  # a view
        weight.mul_(2)  # no block
        block.new_empty(3)  # nothing
    assert traffic.torch_bytes == 7 * block.nbytes and traffic.product_bytes == 0
    hidden = torch.ones(8, 24)
    with Operations(traffic):
        torch.mm(hidden, weight.t(), out=out)  # written
        hidden.addmm_(out, weight)  # read
    assert traffic.product_bytes == 2 * block.nbytes
    assert traffic.units == (2.0, 0.0)


@pytest.mark.parametrize(("schedule", "units"), [("chunked", (3, 1)), ("recompute", (4, 2))])
def test_flops_are_those_that_torch_counts(schedule: str, units: tuple[float, float]) -> None:
    given = hidden_problem(SHAPE)
    traffic = Traffic(SHAPE)
    unknown_to_torch = {torch.ops.aten.addmm_: lambda out, a, b, **rest: mm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=unknown_to_torch) as torch_counts, Operations(traffic):
        ours(given, schedule=schedule, workspace_bytes=2**16).backward()
    assert traffic.units == units
    assert traffic.student_flops + traffic.teacher_flops == torch_counts.get_total_flops()


@interpreted
@pytest.mark.parametrize(
    ("name", "bytes_per_logit", "of_products"),
    [
        ("eopd_kernels, chunked", 18, 4 + 4 + 2 + 2),
        ("eopd_kernels, chunked, fp32 inputs", 20, 4 + 4 + 4 + 4),
        ("eopd_kernels, recompute", 18, 2 * (4 + 4) + 2 + 2),
    ],
)
def test_ours_keeps_to_the_target(name: str, bytes_per_logit: int, of_products: int) -> None:
    (entry,) = (e for e in ENTRIES if e.name == name)
    traffic = count(entry, SHAPE)
    assert isinstance(traffic, Traffic)
    assert traffic.per_logit(traffic.kernel_bytes) == bytes_per_logit
    assert traffic.torch_bytes == 0, "something between kernels and products touches whole blocks"
    assert traffic.per_logit(traffic.product_bytes) == of_products
    assert traffic.units == ((4, 2) if "recompute" in name else (3, 1))
    assert traffic.rest < 0.1 * traffic.kernel_bytes


def test_a_peer_that_cannot_run_says_why() -> None:
    def broken(problem: object) -> torch.Tensor:
        raise RuntimeError("wants a GPU\nand more")

    missing = Entry(Contender("missing", "words", broken, package="no-such-package"))
    failing = Entry(Contender("failing", "words", broken, package="torch"))
    counts = {entry: count(entry, SHAPE) for entry in (missing, failing)}
    assert list(counts.values()) == ["not installed", "RuntimeError: wants a GPU"]
    table = bytes_table(counts)
    assert "not counted: not installed" in table and "not counted: RuntimeError: wants a GPU" in table
    with pytest.raises(RuntimeError):
        count(Entry(Contender("ours", "words", broken)), SHAPE)


def test_the_model() -> None:
    traffic = Traffic(SHAPE, loads={"kernel": 18 * 8 * 1_300})
    gpu = GPUS[1]
    logits = PUBLISHED.tokens * PUBLISHED.vocab
    assert seconds(gpu, PUBLISHED, traffic) == pytest.approx(18 * logits / gpu.memory)
    unit = 2 * 8 * 1_300
    traffic = Traffic(SHAPE, student_flops=3 * unit * 24, teacher_flops=unit * 40)
    assert seconds(gpu, PUBLISHED, traffic) == pytest.approx(2 * logits * (3 * 1024 + 4096) / gpu.bf16)
    assert l2_share(gpu, 1_000, 1) == 1 and 0 < l2_share(gpu, 151_936, 8) < l2_share(gpu, 151_936, 1) < 0.5
    counts = {Entry(CHUNKED): traffic}
    assert "model, not measured" in model_table(counts) and kernels_table(counts)


@interpreted
def test_the_command_prints_its_tables() -> None:
    command = [sys.executable, "-m", "benchmarks.traffic", "--only", "eopd_kernels, chunked", "--tokens", "3"]
    done = subprocess.run([*command, "--vocab", "600"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| eopd_kernels, chunked | – | 32 bits | 16 | 2 | 18 | 0 | 12 | F(3·D_s + 1·D_t) |" in done.stdout
    assert "a model and no measurement" in done.stdout and "`row_loss_and_gradient_kernel`" in done.stdout
