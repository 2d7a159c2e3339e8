"""The acceptance run without a GPU: it says so; a rehearsal of every step; and its logic, on steps that pretend."""

from __future__ import annotations

import contextlib
import csv
import json
import runpy
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import measure
from benchmarks.contenders import GPU_GROUPS, HIDDEN, LIGER, LIGER_JSD, PLAIN, Contender, our, ours
from benchmarks.gpu import parts
from benchmarks.gpu import step as common
from benchmarks.gpu.compare import MOST_ERROR, checks
from benchmarks.gpu.plan import PACKAGES, SECONDS, stages
from benchmarks.gpu.table import Measured, measured
from benchmarks.matrix import GPU_SHAPES, TINY_SHAPES, acceptance
from benchmarks.measure import STAND_IN
from benchmarks.problems import HiddenProblem, gradients, hidden_problem
from benchmarks.records import append, read
from benchmarks.truth import OBJECTIVES, largest_error, truth
from eopd_kernels.backends import cuda, triton
from eopd_kernels.testing.steps import MISSING, ROOT, Outcome, Step, run, summary
from tests.benchmarks.fakes import FAKES
from tests.gpu import build, counters
from tests.gpu.__main__ import Result, judge, results

EVERY = {step.name: step for stage in stages(Path()) for step in stage}


def python(code: str, limit: float = 20.0, may: Any = None, name: str = "step") -> Step:
    return Step(name, (sys.executable, "-c", code), limit, may)


# ---- The runner --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("may", [None, "be missing", "fail"])
@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("print('first'); print('42 passed')", 0, "42 passed"),
        ("print('1 failed'); raise SystemExit(3)", 3, "1 failed"),
        ("import os; os.abort()", -6, "status -6, and not a line"),
        (f"print('not installed: peer'); raise SystemExit({MISSING})", MISSING, "not installed: peer"),
    ],
)
def test_how_a_step_ends(code: str, status: int, detail: str, may: Any, tmp_path: Path) -> None:
    (outcome,) = run([[python(code, may=may)]], 60, tmp_path / "log")
    assert (outcome.status, outcome.detail) == (status, detail)
    forgiven = status == 0 or may == "fail" or (may == "be missing" and status == MISSING)
    assert outcome.fatal != forgiven
    text, of_run = summary([outcome], "title")
    assert of_run == outcome.fatal and text.splitlines()[-1].startswith(f"status {of_run}: ")
    assert ("failed: step" in text) == outcome.fatal
    assert (tmp_path / "log").read_text().endswith(f"[step] {detail}\n") or status == -6


def test_a_tool_that_is_not_there_is_missing(tmp_path: Path) -> None:
    (outcome,) = run([[Step("tool", ("no-such-tool", "--all"), 5, "be missing")]], 60, tmp_path / "log")
    assert outcome.status == MISSING and "no-such-tool" in outcome.detail and not outcome.fatal
    assert replace(outcome, step=replace(outcome.step, may=None)).fatal


def test_a_step_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    hung, after = run([[python(code, limit=1.5)], [python("print('next')")]], 60, tmp_path / "log")
    assert hung.fatal and hung.detail == "time limit of 2 s, after: begun" and after.status == 0
    time.sleep(max(0.0, begin + 5.5 - time.monotonic()))
    assert not mark.exists()


def test_a_step_that_will_not_end_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    with mock.patch("eopd_kernels.testing.steps.GRACE", 0.5):
        (outcome,) = run([[python(code, limit=1.0)]], 60, tmp_path / "log")
    assert outcome.fatal and "time limit" in outcome.detail and outcome.seconds < 10


def test_the_whole_run_has_a_limit(tmp_path: Path) -> None:
    slow = python("import time; time.sleep(30)")
    first, second = run([[slow], [slow]], 1.0, tmp_path / "log")
    assert "time limit" in first.detail and second.detail == "the run's time was used up" and second.fatal


def test_steps_of_one_stage_run_side_by_side_and_are_logged_as_they_come(tmp_path: Path) -> None:
    """Either waits for the other's line in the log."""
    log = tmp_path / "log"
    code = (
        "import sys, time; print(sys.argv[1], flush=True)\n"
        f"while '] ' + sys.argv[2] not in open({str(log)!r}).read(): time.sleep(0.02)"
    )
    pair = [Step(a, (sys.executable, "-c", code, a, b), 20) for a, b in (("left", "right"), ("right", "left"))]
    assert [outcome.status for outcome in run([pair], 60, log)] == [0, 0]


def test_a_run_of_nothing_has_not_passed() -> None:
    assert summary([], "title")[1] == 1


def test_a_backend_that_was_not_built_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(build, "build", lambda: None)
    monkeypatch.setattr(cuda, "unavailable", lambda: "no nvcc found")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    assert build.main() == 1
    assert EVERY["build"].may is None


def test_what_was_built_comes_into_the_package_and_the_rest_stays(tmp_path: Path) -> None:
    package, built = tmp_path / "package", tmp_path / "built"
    for folder, record in (
        (package, {"cpu": {"built": True}}),
        (built, {"cpu": {"built": False}, "cuda": {"built": True}}),
    ):
        folder.mkdir()
        (folder / "_build.json").write_text(json.dumps(record))
    (built / "_cuda.so").write_text("module")
    (package / "_native.so").write_text("kernels")
    build.take(built, package)
    assert {path.name for path in package.iterdir()} == {"_cuda.so", "_native.so", "_build.json"}
    assert json.loads((package / "_build.json").read_text()) == {"cpu": {"built": True}, "cuda": {"built": True}}
    (package / "_build.json").unlink()
    build.take(built, package)
    assert json.loads((package / "_build.json").read_text()) == {"cuda": {"built": True}}


# ---- The plan ----------------------------------------------------------------------------------------------------


def test_the_plan_fits_into_eight_minutes_and_twenty_lines() -> None:
    assert sum(max(step.limit for step in stage) for stage in stages(Path())) <= SECONDS <= 475
    assert len(EVERY) + 2 <= 20
    outcomes = [Outcome(step, 1, 1.0, "word " * 200) for step in EVERY.values()]
    assert max(map(len, summary(outcomes, "")[0].splitlines()[:-1])) <= 240


def test_what_may_be_missing_and_what_may_fail() -> None:
    of = {may: {name for name, step in EVERY.items() if step.may == may} for may in ("be missing", "fail")}
    sanitizers = {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert of == {"be missing": {"profile", "driver", "counters", *sanitizers}, "fail": {"liger", "peers"}}
    assert all(step.may for stage in stages(rehearsal=True) for step in stage)


def test_the_table_has_the_sizes_and_contenders_that_were_asked_for() -> None:
    sizes = {(s.tokens, s.vocab) for s in GPU_SHAPES}
    assert sizes == {(8192, 128_256), (8192, 151_936), (4096, 151_936), (1024, 151_936)}
    assert {(s.student_dim, s.teacher_dim) for s in GPU_SHAPES} == {(2048, 4096)}
    names = [contender.name for group in GPU_GROUPS.values() for contender in group]
    assert names[:4] == ["eopd_kernels cuda", "eopd_kernels triton", PLAIN, "eopd_kernels cuda, recompute"]
    assert {LIGER, LIGER_JSD} < set(names) and len(names) == len(set(names)) == 11
    assert "eopd_kernels torch" not in names


# ---- Without a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout + done.stderr == "no GPU: nothing was run, nothing is claimed\n"
    assert not folder.exists()


def wheel(folder: Path) -> None:
    """The smallest wheel that there is."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as file:
        file.writestr("carried.py", "CARRIED = True\n")
        about = "carried-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", f"carried.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")


def test_a_rehearsal_goes_through_the_run(tmp_path: Path) -> None:
    """On emulated and interpreted kernels; the peers, and what could only say that it needs a GPU, are left out."""
    wheel(tmp_path / "wheels")
    steps = "build wheels table compare profile sweep driver memcheck graph".split()
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--only", *steps]
    options = ["--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    ended = {line.split()[1]: line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()[1:-1]}
    assert list(ended) == sorted(steps, key=list(EVERY).index)
    missing = {name for name, line in ended.items() if line.startswith("missing ")}
    assert missing <= {"memcheck", "graph"} and "needs a GPU" in ended["graph"]
    assert (PACKAGES / "carried.py").exists()
    page = (tmp_path / "out" / "report.md").read_text()
    cases = acceptance((), TINY_SHAPES, "cpu")
    assert "no figure here means anything" in page and all(f"## {case.name}" in page for case in cases)
    assert "## Kernels of a step" in page and "four products alone" in page and "The host alone" in page
    lines = read(tmp_path / "out" / "results.csv", Measured)
    assert len(lines) == len(GPU_GROUPS["ours"]) * len(TINY_SHAPES) and not any(line.failure for line in lines)
    assert all(line.host_seconds and line.peak_bytes for line in lines)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files < {"report.md", "results.csv", "log.txt", "summary.txt", "environment.txt", "smoke.xml", "tests.xml"}


# ---- Tests on a GPU, and what is counted there -------------------------------------------------------------------

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
    assert parts.graph(problem()) == status
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
    missing, *_ = run([[EVERY["racecheck"]]], 60, tmp_path / "log")
    assert (missing.status, missing.detail) == (MISSING, "not installed: cupy") and not missing.fatal
    (tmp_path / "cupy.py").touch()
    (found,) = run([[EVERY["racecheck"]]], 60, tmp_path / "log")
    assert found.fatal and found.status == 1 and found.detail.startswith("--error-exitcode 1 --tool racecheck")


def test_the_driver_imports_no_torch() -> None:
    code = "import runpy, sys; runpy.run_path('tests/gpu/driver.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- The table ---------------------------------------------------------------------------------------------------

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


def test_a_step_reports_to_the_folder_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    common.report("one", "two")
    common.report("three")
    assert (tmp_path / "out" / "report.md").read_text() == "one\n\ntwo\n\nthree\n\n"
