"""The acceptance run without a GPU: it says so; and on a CPU that stands in for one, its logic."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import truth
from benchmarks.gpu.cell import Cell, measured
from benchmarks.gpu.checks import MOST_ERROR, Check, checks, most_memory
from benchmarks.gpu.device import StandIn
from benchmarks.gpu.matrix import SIZES, TINY, Contender, contenders, ours, problem
from eopd_kernels import LMHead, entropy_aware_kl

ROOT = Path(__file__).resolve().parents[2]
PASSED = Cell("ours", SIZES[0], (0.01, 0.02, 0.03), 2**20, MOST_ERROR / 2)
PLAIN = Cell("plain PyTorch", SIZES[0], (0.04,), 2**30, 0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout + done.stderr == "no GPU: nothing was run, nothing is claimed\n"
    assert not folder.exists()


def test_the_matrix_is_the_one_that_was_asked_for() -> None:
    assert {s.tokens for s in SIZES} == {1024, 4096, 8192}
    assert {s.vocab for s in SIZES} == {128_256, 151_936, 262_144}
    assert {(s.student_dim, s.teacher_dim) for s in SIZES} == {(1024, 4096), (2048, 4096)}
    assert len(SIZES) == len(set(SIZES)) == 18


def test_a_stand_in_goes_through_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, under the interpreter; the tests of tests/gpu are collected, and skip."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--stand-in", "--out", str(tmp_path)])
    kept = [c for c in contenders(torch.device("cpu")) if c.ours or c.name == "plain PyTorch"]
    missing = Contender("a peer", "jsd", lambda problem: problem.student.sum(), version=None)
    monkeypatch.setattr(program, "contenders", lambda device: [*kept, missing])
    monkeypatch.setattr(program, "suite", lambda folder, stand_in: Check("tests/gpu", True, "skipped"))
    status = program.main()
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FAILED")]
    assert status == bool(failed)
    assert all(": time:" in line for line in failed), "on sizes this small plain PyTorch may be faster, and only that"
    page = (tmp_path / "report.md").read_text()
    assert "no figure here means anything" in page and ("checks failed" in page) == bool(failed)
    assert all(f"## {size}" in page for size in TINY) and "not installed" in page
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (len(kept) + 1) * len(TINY)
    errors = [float(row["dx_error"]) for row in rows if row["contender"].startswith("eopd")]
    assert len(errors) == (len(kept) - 1) * len(TINY) and max(errors) < MOST_ERROR
    assert all((tmp_path / name).exists() for name in ("checks.csv", "environment.txt"))


def test_tests_that_need_a_gpu_are_found(tmp_path: Path) -> None:
    check = program.suite(tmp_path, stand_in=True)
    assert "skipped" in check.detail or torch.cuda.is_available()
    assert check.passed, (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize(
    ("cell", "failed"),
    [
        (PASSED, []),
        (Cell("ours", SIZES[0], failure="OutOfMemoryError"), ["runs"]),
        (Cell("ours", SIZES[0], (0.01,), 2**20, 0.5), ["dX"]),
        (Cell("ours", SIZES[0], (0.01,), 2**20, float("nan")), ["dX"]),
        (Cell("ours", SIZES[0], (0.01,), 2**50, 0.0), ["memory"]),
        (Cell("ours", SIZES[0], (0.05,), 2**20, 0.0), ["time"]),
        (Cell("another", SIZES[0]), ["runs"]),
    ],
)
def test_checks(cell: Cell, failed: list[str]) -> None:
    made = checks([cell, PLAIN], ["ours"], SIZES[:1])
    assert [c.name.rpartition(": ")[2] for c in made if not c.passed] == failed


def test_the_memory_allowed_is_that_of_the_blocks() -> None:
    size = SIZES[5]
    assert 1 < most_memory(size) / (10 * 1024 * size.vocab + 6 * (size.vocab + size.tokens) * size.student_dim) < 1.1


@pytest.mark.parametrize("divergence", list(truth.TRUTHS))
def test_truths_are_gradients_of_a_mean(divergence: str) -> None:
    given = problem(TINY[0], torch.device("cpu"))
    exact = truth.grad_hidden(given, divergence)
    assert exact is not None
    log_p = (given.student.double() @ given.student_weight.double().t()).log_softmax(-1)
    log_q = (given.teacher.double() @ given.teacher_weight.double().t()).log_softmax(-1)
    (expected,) = torch.autograd.grad(truth.TRUTHS[divergence](log_p, log_q).mean(), given.student)
    assert truth.relative_error(expected, exact) < 2**-8
    assert truth.grad_hidden(given, "another") is None


def test_the_truth_is_that_of_the_specification() -> None:
    given = problem(TINY[1], torch.device("cpu"))
    heads = LMHead(given.student_weight), LMHead(given.teacher_weight)
    entropy_aware_kl(given.student, given.teacher, student_head=heads[0], teacher_head=heads[1]).loss.backward()
    exact = truth.grad_hidden(given, "gated")
    assert exact is not None and given.student.grad is not None
    assert truth.relative_error(given.student.grad, exact) < MOST_ERROR


def test_a_contender_that_fails_is_reported() -> None:
    def broken(problem: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")

    cell = measured(Contender("x", "gated", broken), TINY[0], StandIn())
    assert cell.failure == "RuntimeError: no such kernel" and Cell.of(cell.line()) == cell
    good = measured(ours("torch", "chunked"), TINY[0], StandIn())
    assert good.failure is None and good.peak > 0 and Cell.of(good.line()) == good


def test_a_contender_that_hangs_loses_only_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Cell("x", TINY[0], (1.0,), 1, 0.0).line()
    script = f"print({line!r}, flush=True); import time; time.sleep(60)"
    run = program.run
    monkeypatch.setattr(program, "run", lambda command, limit: run([sys.executable, "-c", script], 5))
    contender = Contender("x", "gated", lambda problem: problem.student.sum())
    cells = program.cells_of(contender, 3, stand_in=True)
    assert [c.failure for c in cells] == [None, "time limit of 3 s"]
    assert [c.failure for c in program.cells_of(contender, 0, stand_in=True)] == ["the run's time was used up"] * 2
