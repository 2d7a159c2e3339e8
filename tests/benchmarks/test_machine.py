"""What a run says of its machine, and the processors that one imitates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.machine import ENVIRONMENTS, imitate, others_running


def test_an_imitated_processor_shares_no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of-this-processor")
    caches = []

    def run(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        assert words[:3] == [sys.executable, "-m", "benchmarks"] and ENVIRONMENTS["avx2"].items() < env.items()
        caches.append(Path(env["TORCHINDUCTOR_CACHE_DIR"]))
        assert not list(caches[0].iterdir())
        (caches[0] / "compiled.so").touch()
        return subprocess.CompletedProcess(words, 3)

    with mock.patch("subprocess.run", run), pytest.raises(SystemExit) as ended:
        imitate("avx2", "benchmarks")
    assert ended.value.code == 3 and not caches[0].exists()


def test_it_starts_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS["avx2"].items():
        monkeypatch.setenv(name, value)
    with mock.patch("subprocess.run") as started:
        imitate("avx2", "benchmarks")
    assert not started.called


def test_threads_of_others_are_counted_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text("3.00 2.00 1.00 4/200 77\n")
    monkeypatch.setattr("benchmarks.machine.LOAD", tmp_path / "loadavg")
    assert others_running() == 3
    monkeypatch.setattr("benchmarks.machine.LOAD", tmp_path / "missing")
    with mock.patch("os.getloadavg", lambda: (1.5, 0.0, 0.0)):
        assert others_running() == 1.5
