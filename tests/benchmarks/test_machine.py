"""What a run says of its machine, and the processors that one imitates."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.machine import ENVIRONMENTS, imitate, others_running


def test_an_imitated_processor_shares_no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of-this-processor")
    with mock.patch("os.execve") as started:
        imitate("avx2", "benchmarks")
    (program, words, environment), _ = started.call_args
    assert (program, words[:3]) == (sys.executable, [sys.executable, "-m", "benchmarks"])
    assert ENVIRONMENTS["avx2"].items() < environment.items()
    cache = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
    assert cache.is_dir() and not list(cache.iterdir())
    cache.rmdir()


def test_it_starts_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS["avx2"].items():
        monkeypatch.setenv(name, value)
    with mock.patch("os.execve") as started:
        imitate("avx2", "benchmarks")
    assert not started.called


def test_threads_of_others_are_counted_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text("3.00 2.00 1.00 4/200 77\n")
    monkeypatch.setattr("benchmarks.machine.LOAD", tmp_path / "loadavg")
    assert others_running() == 3
    monkeypatch.setattr("benchmarks.machine.LOAD", tmp_path / "missing")
    with mock.patch("os.getloadavg", lambda: (1.5, 0.0, 0.0)):
        assert others_running() == 1.5
