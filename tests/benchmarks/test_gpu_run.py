"""The acceptance run without a GPU: it says so; a rehearsal of every step; and its logic, on steps that pretend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.contenders import GPU_GROUPS, LIGER, LIGER_JSD, PLAIN
from benchmarks.gpu import step as common
from benchmarks.gpu.plan import PACKAGES, SECONDS, stages
from benchmarks.gpu.table import Measured
from benchmarks.matrix import GPU_SHAPES, TINY_SHAPES, acceptance
from benchmarks.records import read
from eopd_kernels.backends import cuda, triton
from eopd_kernels.testing.steps import MISSING, ROOT, Outcome, Step, run, summary
from tests.gpu import build

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


def test_a_step_reports_to_the_folder_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    common.report("one", "two")
    common.report("three")
    assert (tmp_path / "out" / "report.md").read_text() == "one\n\ntwo\n\nthree\n\n"
