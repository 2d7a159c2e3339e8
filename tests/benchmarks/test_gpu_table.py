"""The table of the acceptance run: what it must show, its truths, and how a line of it is measured."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import measure
from benchmarks.contenders import HIDDEN, LIGER, PLAIN, Contender, our, ours
from benchmarks.gpu.compare import MOST_ERROR, checks
from benchmarks.gpu.table import Measured, measured
from benchmarks.matrix import GPU_SHAPES, TINY_SHAPES, acceptance
from benchmarks.measure import STAND_IN
from benchmarks.problems import HiddenProblem, gradients, hidden_problem
from benchmarks.records import append, read
from benchmarks.truth import OBJECTIVES, largest_error, truth
from tests.benchmarks.fakes import FAKES

OURS = our("torch")
(CASE,) = acceptance([OURS], GPU_SHAPES[:1], "cpu")


def cell(contender: Contender, **found: Any) -> Measured:
    line = Measured(**vars(CASE.record(contender)))
    return replace(line, **{"seconds": (0.01, 0.02, 0.03), "peak_bytes": 2**20, "student_error": 0.001, **found})


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        ([cell(OURS)], []),
        ([cell(OURS, seconds=(), failure="out of memory: all of the GPU's")], ["out of memory"]),
        ([cell(OURS, student_error=0.5)], ["dX is off by 0.5"]),
        ([cell(OURS, student_error=float("nan"))], ["dX is off by nan"]),
        ([cell(OURS, student_error=None)], ["dX is off by None"]),
        ([], ["was not run"]),
        ([cell(OURS), cell(HIDDEN[PLAIN], seconds=(0.05,))], ["2.50x as fast as plain PyTorch, at least 3x"]),
        ([cell(OURS), cell(HIDDEN[PLAIN], seconds=(0.07,), student_error=0.5)], []),
        ([cell(OURS), cell(HIDDEN[LIGER], seconds=(0.025,))], ["1.25x as fast as Liger"]),
        ([cell(OURS), cell(HIDDEN[LIGER], seconds=(), failure="not installed: liger-kernel")], []),
    ],
)
def test_what_the_table_must_show(found: list[Measured], failed: list[str]) -> None:
    made = checks(CASE, {line.implementation: line for line in found}, {PLAIN: 3.0, LIGER: 1.3})
    assert len(made) == len(failed) and all(words in one for one, words in zip(made, failed, strict=True))


def problem() -> HiddenProblem:
    return hidden_problem(TINY_SHAPES[1], torch.bfloat16)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_truths_are_gradients_of_a_mean(objective: str) -> None:
    given = problem()
    (exact,) = truth(given, objective, of_head=False).gradients
    log_p = (given.student.double() @ given.student_weight.double().t()).log_softmax(-1)
    log_q = (given.teacher.double() @ given.teacher_weight.double().t()).log_softmax(-1)
    (expected,) = torch.autograd.grad(OBJECTIVES[objective](log_p, log_q).mean(), given.student)
    assert largest_error(expected, exact) < 2**-8


def test_the_truth_is_that_of_the_specification() -> None:
    given = problem()
    found, _ = gradients(ours(given), given.leaves)
    assert largest_error(found, truth(given, "gated", of_head=False).gradients[0]) < MOST_ERROR


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVICE", "cpu"), ("METER", STAND_IN), ("ROUNDS", 3)):
        monkeypatch.setattr(f"benchmarks.gpu.table.{name}", value)


@pytest.mark.usefixtures("on_a_cpu")
def test_only_the_first_tokens_are_compared() -> None:
    case = replace(acceptance([OURS], TINY_SHAPES, "cpu")[1], error_tokens=4)
    line = measured(OURS, case, case.source())
    assert line.error_tokens == 4 and line.student_error is not None and line.student_error < MOST_ERROR
    assert not line.failure and line.peak_bytes and line.gradient_bytes and line.host_seconds and len(line.seconds) == 3


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "RuntimeError: wants a / GPU"),
        ("missing", "not installed: no-such-package"),
        ("for GPUs", "for GPUs only"),
    ],
)
def test_a_contender_that_cannot_run_says_why(name: str, why: str) -> None:
    case = acceptance([], TINY_SHAPES, "cpu")[0]
    assert measured(FAKES[name], case, case.source()).failure == why


def test_lines_come_back_from_the_file(tmp_path: Path) -> None:
    line = cell(OURS, host_seconds=0.004)
    append(tmp_path / "results.csv", [line])
    assert read(tmp_path / "results.csv", Measured) == [line]
    assert "host_seconds" in next(csv.reader((tmp_path / "results.csv").open()))


def test_the_queue_is_filled_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    gpu = mock.MagicMock()
    gpu._sleep.side_effect = lambda cycles: order.append("sleep")
    gpu.synchronize.side_effect = lambda: order.append("wait")
    gpu.Event.return_value.record.side_effect = lambda: order.append("event")
    gpu.Event.return_value.elapsed_time.return_value = 5.0
    monkeypatch.setattr(torch, "cuda", gpu)
    assert measure.gpu_seconds(lambda: order.append("step")) == 0.005
    assert order == ["wait", "sleep", "event", "step", "event", "wait"]
    order.clear()
    measure.gpu_host_seconds(lambda: order.append("step"))
    assert order == ["wait", "step"]
