"""The steps of the run in their order, with the seconds that each may take."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from eopd_kernels.testing.steps import ROOT, Step

SECONDS = 475.0  # and five that a step may take to end
PACKAGES = ROOT / "build" / "gpu" / "packages"  # what was carried is installed here, and nothing on the machine changes
REHEARSAL = "EOPD_REHEARSAL"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def stages(wheels: Path | None = None, rehearsal: bool = False) -> list[list[Step]]:
    """Returns the steps; those of one list run side by side. In a rehearsal any may be missing."""
    python = sys.executable
    tests, driver = (python, "-m", "tests.gpu"), (python, str(ROOT / "tests" / "gpu" / "driver.py"))
    processes = () if rehearsal else ("-n", "8", "--dist", "worksteal", "--timeout", "90")
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(PACKAGES))
    carried = [Step("wheels", (*pip, *map(str, sorted(wheels.glob("*.whl")))), 45)] if wheels else []
    made = [
        [Step("build", (python, "-m", "tests.gpu.build"), 50), *carried],
        [Step("smoke", (*tests, "-k", "smoke"), 35)],
        [Step("table", ours("table", "ours"), 55)],
        [Step("liger", ours("table", "liger"), 50, "fail")],
        [Step("peers", ours("table", "peers"), 40, "fail")],
        [Step("compare", ours("compare"), 10)],
        [Step("profile", ours("parts", "profile"), 20, "be missing")],
        [Step("sweep", ours("parts", "sweep"), 20)],
        [Step("tests", (*tests, *processes), 85)],
        [
            Step("driver", driver, 65, "be missing"),
            *(Step(tool, (*driver, tool), 65, "be missing") for tool in SANITIZERS),
        ],
        [Step("counters", (python, "-m", "tests.gpu.counters"), 30, "be missing")],
        [Step("graph", ours("parts", "graph"), 15)],
    ]
    return [[replace(s, may=s.may or "be missing") for s in stage] for stage in made] if rehearsal else made


def ours(module: str, *words: str) -> tuple[str, ...]:
    return sys.executable, "-m", f"benchmarks.gpu.{module}", *words


def environment(folder: Path, rehearsal: bool) -> dict[str, str]:
    """Returns what the steps find in their environment: where to report to, what to import, and what stands in."""
    tools = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), *sorted(Path("/opt/nvidia").glob("*/*"))]
    found = {
        "OUT": str(folder),
        "PYTHONPATH": os.pathsep.join((str(PACKAGES), str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "PATH": os.pathsep.join((os.environ.get("PATH", ""), *map(str, tools))),
    }
    # In a rehearsal kernels are interpreted or emulated, and a peer that compiles runs what it would compile.
    stand_in = {REHEARSAL: "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found | stand_in if rehearsal else found
