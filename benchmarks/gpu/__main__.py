"""``python -m benchmarks.gpu``, or ``make gpu``: the whole acceptance run, in under ten minutes.

Status 0: everything was run and every check passed. 1: a check failed. 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..measure import progress
from . import report
from .cell import MARK, Cell
from .checks import Check, checks
from .device import device
from .matrix import SIZES, TINY, Contender, contenders

NO_GPU = "no GPU: nothing was run, nothing is claimed"
SECONDS = 570.0
# A process per contender: some twenty seconds of imports, compilation and problems, and eighteen sizes.
CONTENDER_SECONDS = 75.0
SUITE_SECONDS = 150.0
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), metavar="FOLDER", help="default: gpu-report")
    parser.add_argument("--stand-in", action="store_true", help="test this program: tiny sizes on a CPU, no claims")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.stand_in):
        print(NO_GPU, file=sys.stderr)
        return 2
    end = time.monotonic() + SECONDS
    arguments.out.mkdir(parents=True, exist_ok=True)
    made = [suite(arguments.out, arguments.stand_in)]
    on = device(arguments.stand_in)
    sizes = TINY if arguments.stand_in else SIZES
    cells: list[Cell] = []
    entered = contenders(on.device)
    for contender in entered:
        limit = min(CONTENDER_SECONDS, end - time.monotonic())
        cells += cells_of(contender, limit, arguments.stand_in)
    made += checks(cells, [c.name for c in entered if c.ours], sizes)
    report.write(arguments.out, on.facts(), cells, made)
    failed = [check for check in made if not check.passed]
    for check in failed:
        print(f"FAILED {check.name}: {check.detail}", file=sys.stderr)
    print(f"{len(made) - len(failed)} of {len(made)} checks passed; see {arguments.out / 'report.md'}")
    return 1 if failed else 0


def suite(folder: Path, stand_in: bool) -> Check:
    """The tests that need a GPU; where a CPU stands in, they are collected and skip."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-p", "no:cacheprovider"]
    progress("tests that need a GPU:")
    output, status = run(command, SUITE_SECONDS)
    (folder / "tests.log").write_text(output)
    lines = output.strip().splitlines()
    summary = lines[-1] if lines else ""
    skipped = "skipped" in summary and not stand_in
    return Check("tests/gpu", status == 0 and not skipped, summary)


def cells_of(contender: Contender, limit: float, stand_in: bool) -> list[Cell]:
    """Every size of one contender, in a process that may take so many seconds."""
    sizes = TINY if stand_in else SIZES
    if contender.version is None or limit <= 0:
        why = "not installed" if contender.version is None else "the run's time was used up"
        return [Cell(contender.name, size, failure=why) for size in sizes]
    progress(f"  {contender.name}, at most {limit:.0f} s")
    command = [sys.executable, "-m", "benchmarks.gpu.cell", contender.name, *(["--stand-in"] if stand_in else [])]
    output, status = run(command, limit)
    cells = [Cell.of(line) for line in output.splitlines() if line.startswith(MARK)]
    why = f"time limit of {limit:.0f} s" if status is None else f"the process ended with {status}"
    return cells + [Cell(contender.name, size, failure=why) for size in sizes[len(cells) :]]


def run(command: Sequence[str], limit: float) -> tuple[str, int | None]:
    """What a command printed, and its status: None where it was still running at the limit and was killed."""
    # Asked for by torch's deterministic algorithms, under which the suite runs.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return output, None
    return output, process.returncode


if __name__ == "__main__":
    sys.exit(main())
