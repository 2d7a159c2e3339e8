"""The acceptance run without a GPU: it says so; and on a CPU that stands in for one, its logic."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu as program
from benchmarks.contenders import HIDDEN, PLAIN, Contender, ours
from benchmarks.gpu import MOST_ERROR, Check, checks, most_memory
from benchmarks.matrix import GPU_SHAPES, TINY_SHAPES, acceptance
from benchmarks.measure import STAND_IN
from benchmarks.problems import HiddenProblem, gradients, hidden_problem
from benchmarks.records import Record, read
from benchmarks.truth import OBJECTIVES, largest_error, truth
from benchmarks.worker import Room
from eopd_kernels.testing.processes import MIB
from tests.benchmarks.fakes import FAKES, small

ROOT = Path(__file__).resolve().parents[2]
OURS = Contender("ours", "gated")
CASE = acceptance([OURS])[0]
PASSED = replace(CASE.record(OURS), seconds=(0.01, 0.02, 0.03), peak_bytes=MIB, student_error=MOST_ERROR / 2)
PLAIN_ONE = replace(CASE.record(HIDDEN[PLAIN]), seconds=(0.04,), peak_bytes=2**30, student_error=0.1)
TINY = acceptance([OURS], stand_in=True)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "log")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout + done.stderr == "no GPU: nothing was run, nothing is claimed\n"
    assert not folder.exists()


def test_the_matrix_is_the_one_that_was_asked_for() -> None:
    assert {s.tokens for s in GPU_SHAPES} == {1024, 4096, 8192}
    assert {s.vocab for s in GPU_SHAPES} == {128_256, 151_936, 262_144}
    assert {(s.student_dim, s.teacher_dim) for s in GPU_SHAPES} == {(1024, 4096), (2048, 4096)}
    assert len(GPU_SHAPES) == len(set(GPU_SHAPES)) == 18


def test_a_stand_in_goes_through_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, under the interpreter; the tests of tests/gpu are collected, and skip."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--stand-in", "--out", str(tmp_path)])
    kept = [c for c in program.contenders("cpu") if c.package is None]
    monkeypatch.setattr(program, "contenders", lambda device: [*kept, FAKES["missing"]])
    monkeypatch.setattr(program, "suite", lambda folder, stand_in: Check("tests/gpu", True, "skipped"))
    status = program.main()
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FAILED")]
    assert status == bool(failed)
    assert all(": time:" in line for line in failed), "on sizes this small plain PyTorch may be faster, and only that"
    page = (tmp_path / "report.md").read_text()
    assert "no figure here means anything" in page and ("checks failed" in page) == bool(failed)
    assert all(f"## {case.name}" in page for case in TINY) and "not installed" in page
    records = read(tmp_path / "results.csv")
    assert len(records) == (len(kept) + 1) * len(TINY)
    errors = [r.student_error for r in records if r.implementation.startswith("eopd") and r.student_error is not None]
    assert len(errors) == (len(kept) - 1) * len(TINY) and max(errors) < MOST_ERROR
    assert all((tmp_path / name).exists() for name in ("checks.csv", "environment.txt"))


def test_tests_that_need_a_gpu_are_found(tmp_path: Path) -> None:
    check = program.suite(tmp_path, stand_in=True)
    assert "skipped" in check.detail or torch.cuda.is_available()
    assert check.passed, (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize(
    ("record", "failed"),
    [
        (PASSED, []),
        (replace(PASSED, seconds=(), failure="out of memory: all of the GPU's"), ["runs"]),
        (replace(PASSED, student_error=0.5), ["dX"]),
        (replace(PASSED, student_error=float("nan")), ["dX"]),
        (replace(PASSED, peak_bytes=2**50), ["memory"]),
        (replace(PASSED, seconds=(0.05,)), ["time"]),
        (replace(PASSED, implementation="another"), ["runs"]),
    ],
)
def test_checks(record: Record, failed: list[str]) -> None:
    made = checks([record, PLAIN_ONE], ["ours"], [CASE])
    assert [c.name.rpartition(": ")[2] for c in made if not c.passed] == failed


def test_the_memory_allowed_is_that_of_the_blocks() -> None:
    size = GPU_SHAPES[5]
    assert 1 < most_memory(size) / (10 * 1024 * size.vocab + 6 * (size.vocab + size.tokens) * size.student_dim) < 1.1


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


def test_only_the_first_tokens_are_compared() -> None:
    contender = Contender("ours", "gated", partial(ours, backend="torch"))
    few = replace(TINY[1], error_tokens=4)
    record = program.measured(contender, few, STAND_IN)
    assert record.error_tokens == 4 and record.student_error is not None and record.student_error < MOST_ERROR


def test_a_contender_that_fails_is_reported(room: Room) -> None:
    records = program.records_of(FAKES["broken"], TINY, 60, room, stand_in=True)
    assert [r.failure for r in records] == ["RuntimeError: wants a / GPU"] * len(TINY)
    good = program.measured(program.our("torch", "chunked"), TINY[0], STAND_IN)
    assert not good.failure and good.peak_bytes is not None and good.peak_bytes > 0


def test_a_contender_that_hangs_loses_only_what_is_left(room: Room) -> None:
    shapes = [case.shape.tokens for case in TINY]
    slow = Contender("slow", "words", partial(sleeping, tokens=shapes[1]))
    records = program.records_of(slow, TINY, 20, room, stand_in=True)
    assert [r.failure for r in records] == ["", "time limit of 20 s"]
    late = program.records_of(slow, TINY, 0, room, stand_in=True)
    assert [r.failure for r in late] == ["the run's time was used up"] * len(TINY)


def sleeping(problem: HiddenProblem, tokens: int) -> torch.Tensor:
    """A loss that hangs on a problem of so many tokens."""
    if len(problem.student) == tokens:
        time.sleep(60)
    return small(problem)
