"""The harness: who fails gets a line that says why, memory that is known is seen, turns alternate."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.contenders import HIDDEN, OURS, PLAIN, PRODUCTS
from benchmarks.measure import LEAST_ROUNDS, rounds
from benchmarks.problems import LogitsProblem, Shape, hidden_problem, logits_problem
from benchmarks.records import append, read
from benchmarks.run import answering, load, run, save, tiny
from benchmarks.truth import errors, truth
from eopd_kernels.testing.processes import MIB
from tests.benchmarks import fakes
from tests.benchmarks.fakes import FAKES, HELD, case
from tests.processes import fork_what_is_spawned, fresh_process

# The system counts pages in batches of some per thread.
BATCHES = MIB


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreters of their own, which take three seconds each, are test_gpu_run.py's and test_measuring.py's."""
    fork_what_is_spawned(monkeypatch)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "log"


def test_whoever_fails_gets_a_line_and_the_others_their_figures(log: Path) -> None:
    records = {r.implementation: r for r in run(case(*FAKES, limit=4.0), "cpu", log)}
    assert list(records) == list(FAKES)
    failures = {name: r.failure for name, r in records.items() if r.failure}
    assert failures.pop("greedy").startswith("out of memory: more than ")
    assert failures == {
        "broken": "RuntimeError: wants a / GPU",
        "breaking at the third": "RuntimeError: wants a / GPU",
        "dying": "the process ended with status 7",
        "sleeping": "out of time: more than 4 s",
        "missing": "not installed: no-such-package",
        "for GPUs": "for GPUs only",
    }
    assert all(records[name].seconds == () and records[name].peak_bytes is None for name in failures)
    for name in ("small", "holding"):
        assert len(records[name].seconds) >= LEAST_ROUNDS and min(records[name].seconds) > 0
    gradients = 4 * (fakes.SHAPE.tokens + fakes.SHAPE.vocab) * fakes.SHAPE.student_dim
    assert records["small"].gradient_bytes == gradients
    small, holding = records["small"].peak_bytes, records["holding"].peak_bytes
    assert small is not None and small < 16 * MIB
    assert holding is not None and HELD - BATCHES <= holding < HELD + 16 * MIB


def test_without_inputs_every_line_says_so(log: Path) -> None:
    given = replace(case("small", "broken"), source=fakes.no_problem)
    records = run(given, "cpu", log)
    assert [r.failure for r in records] == ["no inputs: ValueError: there are no inputs"] * 2


def test_ours_is_measured_beside_the_floor(log: Path) -> None:
    given = replace(case("small"), contenders=tuple(HIDDEN[name] for name in (PRODUCTS, OURS, PLAIN)))
    products, ours, plain = run(given, "cpu", log)
    assert products.seconds and products.peak_bytes is None and products.student_error is None
    for record in (ours, plain):
        assert record.seconds and record.peak_bytes is not None and record.error_tokens == 4
        assert record.loss_error is not None and record.loss_error < 1e-4
        assert record.student_error is not None and 0 < record.student_error < 1e-3
        assert record.weight_error is not None and 0 < record.weight_error < 1e-3
        assert record.divergence is not None and record.divergence > 0


def peak_of_inputs_taken_back(folder: Path) -> int:
    found: list[LogitsProblem] = []

    def remembered(path: Path, device: str) -> LogitsProblem:
        found.append(load(path, device))
        return found[0]

    with mock.patch("benchmarks.run.load", remembered):
        answer = answering(HIDDEN[OURS], folder, "cpu")
    for side in found[0].sides.values():
        taken_back(side)
    return answer("peak")


def taken_back(tensor: torch.Tensor) -> None:
    """What the system does with a file's pages when it is short of memory."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="what the system takes back is told to Linux")
def test_inputs_that_the_system_took_back_are_not_the_steps(tmp_path: Path) -> None:
    problem = hidden_problem(Shape(32, 32_768, 256, 256))
    save(problem, tmp_path / "problem.pt")
    logits, weight = 2 * 4 * 32 * 32_768, 4 * 32_768 * 256
    # Panels, and what the products keep; both heads would be 64 MiB more.
    assert fresh_process(peak_of_inputs_taken_back, tmp_path) < logits + weight + 24 * MIB


def test_a_clock_that_fails_leaves_the_others_in_turn() -> None:
    seen: list[str] = []

    def clock(name: str) -> float | None:
        seen.append(name)
        return None if name == "B" and seen.count("B") == 2 else 1.0

    times = rounds({name: lambda name=name: clock(name) for name in "ABC"}, seconds=0)  # type: ignore[misc]
    assert "".join(seen) == "ABC" + "ABC" + "AC" * (LEAST_ROUNDS - 2)
    assert list(times) == ["A", "C"] and {len(values) for values in times.values()} == {LEAST_ROUNDS}


def test_long_rounds_are_not_repeated() -> None:
    assert len(rounds({"A": lambda: 1.0}, seconds=0, patience=-1)["A"]) == 1


@pytest.mark.parametrize(
    ("patience", "order"),
    [(20.0, "ABC" * 2 + "AB" * 7), (11.0, "ABC" + "AB" * 5), (2.0, "ABC" + "AB"), (100.0, "ABC" * LEAST_ROUNDS)],
)
def test_quick_ones_go_on_where_slow_ones_do_not(patience: float, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, now = [], [0.0]

    def clock(name: str, seconds: float) -> float:
        seen.append(name)
        now[0] += seconds
        return seconds

    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: now[0])
    steps = {"A": 1.0, "B": 1.5, "C": 9.0}
    rounds({name: lambda name=name: clock(name, steps[name]) for name in steps}, seconds=0, patience=patience)  # type: ignore[misc]
    assert "".join(seen) == order


@pytest.mark.parametrize(
    "problem", [hidden_problem(Shape(6, 40, 8, 8), torch.bfloat16), logits_problem(6, 40)], ids=["h", "l"]
)
def test_a_problem_comes_back_from_its_file(problem: LogitsProblem, tmp_path: Path) -> None:
    save(problem, tmp_path / "problem.pt")
    loaded = load(tmp_path / "problem.pt", "cpu")
    assert type(loaded) is type(problem) is type(tiny(loaded))
    for name, side in problem.sides.items():
        assert torch.equal(getattr(loaded, name), side) and getattr(loaded, name).requires_grad == side.requires_grad


def test_records_come_back_from_the_csv(tmp_path: Path) -> None:
    record = replace(
        case("small").record(FAKES["small"]), seconds=(0.25, 0.5), peak_bytes=12, gradient_bytes=3, loss_error=1e-7
    )
    failed = replace(case("broken").record(FAKES["broken"]), failure='a "quoted", failure')
    append(tmp_path / "a.csv", [record])
    append(tmp_path / "a.csv", [failed])
    assert read(tmp_path / "a.csv") == [record, failed] and read(tmp_path / "none.csv") == []


def test_truth_is_that_of_autograd_and_errors_are_relative() -> None:
    problem = hidden_problem(Shape(70, 40, 8, 8)).first(50)
    exact = truth(problem, "reverse")
    wide = problem.with_sides({name: side.double() for name, side in problem.sides.items()})
    log_p, log_q = (
        (x @ w.t()).log_softmax(-1)
        for x, w in ((wide.student, wide.student_weight), (wide.teacher, wide.teacher_weight))
    )
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    gradients = [leaf.grad for leaf in wide.leaves if leaf.grad is not None]
    assert errors(loss, gradients, exact) == pytest.approx((0, 0, 0), abs=1e-12)
    found = errors(loss * 1.5, [1.25 * gradients[0], 0.5 * gradients[1]], exact)
    assert found == pytest.approx((0.5, 0.25, 0.5))
