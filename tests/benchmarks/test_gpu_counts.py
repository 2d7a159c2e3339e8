"""What is judged on a GPU beside the table: which skips pass, counters, a graph, the sanitizers, the driver."""

from __future__ import annotations

import contextlib
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.plan import stages
from benchmarks.matrix import TINY_SHAPES
from benchmarks.measure import STAND_IN
from benchmarks.problems import hidden_problem
from eopd_kernels.backends import cuda, triton
from eopd_kernels.testing.steps import MISSING, ROOT, run
from tests.gpu import counters
from tests.gpu.__main__ import Result, judge, results

ALL = [Result(f"tests.test_x[{backend}-bf16]", "passed") for backend in ("cuda", "triton", "torch")]
CPU = Result("tests.test_x[cpu-bf16]", "skipped", "backend='cpu' takes CPU tensors, got tensors on cuda:0")


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([*ALL, CPU], 0, "3 passed, 1 skipped, cuda 1 of 1, triton 1 of 1, torch 1 of 1"),
        ([*ALL, Result("test_cuda_on_a_gpu.test_y", "skipped", "needs two GPUs")], 1, "cuda passed 1 of 2"),
        ([*ALL, ALL[0], Result("test_cuda_on_a_gpu.test_y", "skipped", "needs two GPUs")], 0, "cuda 2 of 3"),
        ([*ALL, Result("tests.test_y[cuda]", "failed")], 1, "wrong: tests.test_y[cuda]"),
        ([*ALL, Result("tests.test_y", "skipped", "could not import triton")], 1, "(could not import triton)"),
        (ALL[1:], 1, "cuda passed 0 of 0"),
        ([Result("tests.test_y[cuda]", "skipped", "needs a GPU")], MISSING, "needs a GPU"),
        ([], 1, "no test was found"),
    ],
)
def test_which_skips_pass(found: list[Result], status: int, words: str) -> None:
    judged, text = judge(found)
    assert judged == status and words in text


def test_reports_of_pytest_are_read(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('backend', ['cuda', 'triton'])\n"
        "def test_it(backend): pytest.skip('needs two GPUs') if backend == 'cuda' else None\n"
        "def test_wrong(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
    )
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = {result.name.rpartition(".")[2]: result for result in results(report)}
    outcomes = {name: result.outcome for name, result in found.items()}
    failed = {"test_wrong": "failed", "test_broken": "failed"}
    assert outcomes == {"test_it[cuda]": "skipped", "test_it[triton]": "passed", **failed}
    assert "needs two GPUs" in found["test_it[cuda]"].reason and found["test_it[cuda]"].backends == {"cuda"}


def emulated() -> bool:
    """Whether the CUDA kernels run on a CPU here."""
    return cuda.unavailable() is None and cuda.kernels().device_type == "cpu"


def counted(cuda_reads: float) -> list[str]:
    """What ncu prints."""
    names = ["ID", "Kernel Name", counters.READ, counters.WRITTEN, counters.TIME, counters.SHARE]
    pairs = counters.ROWS * counters.COLUMNS
    template = "void eopd::cuda::row_loss_and_gradient_kernel<eopd::cuda::Sides<float, float>>(int)"
    lines = [names, ["", "", "byte", "byte", "ns", "%"]]
    for kernel, reads in ((template, cuda_reads), ("row_loss_and_gradient_kernel", 16)):
        lines.append(["0", kernel, f"{reads * pairs:,.0f}", f"{2 * pairs}", "1,500,000", "85.5"])
    return ["==PROF== Connected", *(",".join(f'"{word}"' for word in line) for line in lines)]


@pytest.mark.skipif(not emulated() or triton.unavailable() is not None, reason="wants both kernels on a CPU")
def test_both_kernels_are_launched_for_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in (("DEVICE", "cpu"), ("ROWS", 2), ("COLUMNS", 1040)):
        monkeypatch.setattr(counters, name, value)
    cuda.kernels().reset_counters()
    assert counters.launch() == 0 and cuda.kernels().counters()["launches"] == 1


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.1, 1)])
def test_a_graph_is_compared_with_the_step_that_it_captures(
    factor: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that gives other gradients while it is captured."""
    now = 1.0

    @contextlib.contextmanager
    def graph(captured: Any) -> Iterator[None]:
        nonlocal now
        now = factor
        yield
        now = 1.0

    monkeypatch.setattr(parts, "our", lambda backend: mock.Mock(step=lambda given: lambda: [now * torch.ones(3)]))
    for name, value in (("REHEARSED", False), ("METER", STAND_IN)):
        monkeypatch.setattr(parts, name, value)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert parts.graph(hidden_problem(TINY_SHAPES[1], torch.bfloat16)) == status
    assert ("other gradients" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(("reads", "status"), [(8.1, 0), (16.0, 1)])
def test_each_logit_is_read_once_by_the_counters(reads: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert counters.judge(counted(reads)) == status
    text = capsys.readouterr().out
    assert f"cuda reads {reads:.2f} and writes 2.00 bytes a column, 1.500 ms, 86 %" in text
    assert "triton reads 16.00" in text
    assert counters.judge(counted(8)[:1]) == 1  # neither kernel was seen


@pytest.mark.skipif(not emulated(), reason="no emulated CUDA kernels")
def test_the_driver_without_torch_notices_a_wrong_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    driver = runpy.run_path(str(ROOT / "tests" / "gpu" / "driver.py"))
    main, exact = driver["main"], driver["exact"]
    with mock.patch.dict(main.__globals__, COLUMNS=(301,), exact=lambda *sides: 1.01 * exact(*sides)):
        assert main() == 1
    assert "1 to 1: off by" in capsys.readouterr().out


def test_the_sanitizers_status_is_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    racecheck = next(step for stage in stages(Path()) for step in stage if step.name == "racecheck")
    missing, *_ = run([[racecheck]], 60, tmp_path / "log")
    assert (missing.status, missing.detail) == (MISSING, "not installed: cupy") and not missing.fatal
    (tmp_path / "cupy.py").touch()
    (found,) = run([[racecheck]], 60, tmp_path / "log")
    assert found.fatal and found.status == 1 and found.detail.startswith("--error-exitcode 1 --tool racecheck")


def test_the_driver_imports_no_torch() -> None:
    code = "import runpy, sys; runpy.run_path('tests/gpu/driver.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
