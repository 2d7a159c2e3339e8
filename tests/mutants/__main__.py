"""Runs the suite against every mutant in a copy of the project, and fails if one survives or cannot be made.

python -m tests.mutants [--only TEXT] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .catalogue import MUTANTS
from .mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ["eopd_kernels", "csrc", "python", "configs", "tests", "benchmarks", "setup.py", "pyproject.toml", "build"]
# Quick and telling first. What needs minutes and tests programs, benchmarks or memory is left out.
NAMES = """objective/test_gates row_math/test_top_k test_paper inputs/test_top_k_teacher inputs/test_per_token
test_top_k_reverse test_cross_entropy test_objectives test_served_teacher test_rows
test_choice_of_backend test_rows_mixture
test_loss test_function test_oracle objective/test_objective row_math/test_statistics heads/test_lm_head
schedules/test_schedules inputs/test_check test_gpu_path schedules/test_objective_costs
backends/test_cpu_capability backends/test_cpu_mixture backends/test_triton_rows backends/test_cuda_plan
backends/test_cuda_rows backends/test_cuda_availability""".split()
SUITE = [f"tests/{name}.py" for name in NAMES]
TESTS_FAILED = 1  # pytest's exit code; any other than it or 0 means that the suite did not run


def make_copy(folder: Path, project: Path = ROOT) -> None:
    """A project as it stands, with its build, so that only what a mutant changes is compiled again."""
    for name in COPIED:
        source = project / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, folder / name)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{folder / 'python'}",
        "EOPD_BUILD_CPU": "auto",
        "EOPD_BUILD_CUDA": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def suite(folder: Path, mutants: Iterable[Mutant]) -> subprocess.CompletedProcess[str]:
    """The tests that are to notice ``mutants``: of the backends whose kernels are interpreted, which is slow, only
    those that their names or files speak of, and these first."""
    mutants = list(mutants)
    rooms = {test for mutant in mutants for test in mutant.tests or SUITE}
    words = " ".join(f"{mutant.name} {mutant.file(ROOT).relative_to(ROOT)}" for mutant in mutants).lower()
    slow = {name: name in words for name in ("triton", "cuda")}
    left_out = " and ".join(f"not {name}" for name, needed in slow.items() if not needed)
    first = [test for test in rooms if any(needed and name in test for name, needed in slow.items())]
    order = [*first, *SUITE, *sorted(rooms)]
    tests = sorted(rooms, key=order.index)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", *(["-k", left_out] if left_out else [])]
    return run(folder, sys.executable, "-m", "pytest", *options, *tests)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "setup.py", "-q", "build_ext", "--inplace")


def verdict(mutant: Mutant, folder: Path, project: Path = ROOT) -> str | None:
    """The test that noticed the mutant of ``project``, or None if it survived."""
    make_copy(folder, project)
    mutant.made_in(folder)
    target = mutant.file(ROOT)
    if target.suffix != ".py" and target.parent.name != "cuda":  # CUDA's are emulated, and the tests compile that
        built = build(folder)
        if built.returncode or not json.loads((folder / "eopd_kernels/_build.json").read_text())["cpu"]["built"]:
            raise ValueError(f"{mutant.name}: does not compile\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    result = suite(folder, [mutant])
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return f"killed by signal {-result.returncode}"
    if result.returncode != TESTS_FAILED:
        raise ValueError(f"{mutant.name}: the suite did not run\n{result.stdout[-2000:]}")
    noticed = ("FAILED tests", "ERROR tests")  # in the test, or in what a file's tests are given
    return next(line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(noticed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only in m.name]

    with tempfile.TemporaryDirectory() as temporary:
        healthy = Path(temporary) / "healthy"
        make_copy(healthy)
        build(healthy)  # as mutants are, for which a warning is no error: so that theirs begin from it
        result = suite(healthy, mutants)
        if result.returncode != 0:
            print(f"The suite fails without any mutant:\n{result.stdout[-3000:]}")
            return 1

        def judged(index: int) -> tuple[str, bool]:
            mutant, folder = mutants[index], Path(temporary) / str(index)
            try:
                test = verdict(mutant, folder, healthy)
            except ValueError as error:
                return f"NOT MADE  {error}", False
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return (f"caught    {mutant.name}: {test}", True) if test else (f"SURVIVED  {mutant.name}", False)

        caught = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            for line, good in pool.map(judged, range(len(mutants))):
                print(line, flush=True)
                caught += good
    print(f"{caught} of {len(mutants)} mutants caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
