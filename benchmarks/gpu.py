"""``python -m benchmarks.gpu``, or ``make gpu``: the acceptance run on a GPU, in under ten minutes.

It runs the tests that need a GPU, then a matrix of sizes beside every installed peer.

Status 0: everything was run and every check passed. 1: a check failed. 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from eopd_kernels.rows import BACKENDS, choose
from eopd_kernels.schedules.workspace import GPU_USUAL_MIN_TOKENS, GPU_WORKSPACE_BYTES
from eopd_kernels.testing import pretend

from .contenders import GPU_PEERS, HIDDEN, PLAIN, Contender, ours
from .machine import gpu_facts
from .matrix import acceptance
from .measure import CUDA, STAND_IN, Meter, progress
from .page import block, markdown_table
from .problems import Shape
from .records import Case, Record, append
from .tables import gpu_table
from .truth import OBJECTIVES, largest_error, truth
from .worker import Answering, Failed, Room, Worker, reason

NO_GPU = "no GPU: nothing was run, nothing is claimed"
SECONDS = 570.0
# A process per contender: some twenty seconds of imports, compilation and problems, and eighteen sizes.
CONTENDER_SECONDS = 75.0
SUITE_SECONDS = 150.0
WARM_UPS, ROUNDS = 2, 7
ROOT = Path(__file__).resolve().parents[1]
# dX in bf16: the block of gradients is rounded once, the result once more.
MOST_ERROR = 3 * 2**-8
# fp32 logits of both sides and the gradient in bf16.
BYTES_PER_LOGIT = 4 + 4 + 2
# For what is small beside the blocks: row statistics, a chunk's hidden states, the allocator's rounding. The products'
# workspaces are of fixed size.
SLACK, PRODUCTS_WORKSPACE = 1.05, 64 * 2**20


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    name: str
    passed: bool
    detail: str = ""


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
    entered = contenders("cpu" if arguments.stand_in else "cuda")
    cases = acceptance(entered, arguments.stand_in)
    room = Room((arguments.out / "contenders.log").resolve())
    found: list[Record] = []
    for contender in entered:
        limit = min(CONTENDER_SECONDS, end - time.monotonic())
        found += records_of(contender, cases, limit, room, arguments.stand_in)
    made += checks(found, [c.name for c in entered if c.package is None and c.name != PLAIN], cases)
    write(arguments.out, gpu_facts(), found, made)
    failed = [check for check in made if not check.passed]
    for check in failed:
        print(f"FAILED {check.name}: {check.detail}", file=sys.stderr)
    print(f"{len(made) - len(failed)} of {len(made)} checks passed; see {arguments.out / 'report.md'}")
    return 1 if failed else 0


def suite(folder: Path, stand_in: bool) -> Check:
    """Runs the tests that need a GPU; where a CPU stands in, they are collected and skip."""
    progress("tests that need a GPU:")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-p", "no:cacheprovider"]
    # Asked for by torch's deterministic algorithms, under which the suite runs.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with (folder / "tests.log").open("w+") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=SUITE_SECONDS, check=False
            )
            passed = done.returncode == 0
        except subprocess.TimeoutExpired:
            passed = False
        log.seek(0)
        summary = next(reversed(log.read().strip().splitlines()), "")
    return Check("tests/gpu", passed and (stand_in or "skipped" not in summary), summary)


def contenders(device: str) -> list[Contender]:
    """Returns every backend of the package that takes this device's tensors, plain PyTorch, and the peers."""
    able = []
    for name in sorted(BACKENDS, key=lambda name: name == "torch"):  # kernels first
        with contextlib.suppress(ValueError):  # a backend for another kind of device refuses
            choose(name, torch.device(device))
            able.append(name)
    own = [our(backend, "chunked") for backend in able]
    return [*own, our(able[0], "recompute"), HIDDEN[PLAIN], *GPU_PEERS]


def our(backend: str, schedule: str) -> Contender:
    loss = partial(ours, backend=backend, schedule=schedule)
    return Contender(f"eopd_kernels {backend}, {schedule}", "gated", loss)


def records_of(
    contender: Contender, cases: Sequence[Case], limit: float, room: Room, stand_in: bool = False
) -> list[Record]:
    """Measures one contender on every case, in a process of its own that may take ``limit`` seconds."""
    why = contender.refusal("cuda") or ("the run's time was used up" if limit <= 0 else None)
    found: list[Record] = []
    if why is None:
        progress(f"  {contender.name}, at most {limit:.0f} s")
        end = time.monotonic() + limit
        worker = Worker(partial(prepare, contender, stand_in), room)
        try:
            worker.answer(limit)
            for case in cases:
                found.append(worker.ask(case, max(0.0, end - time.monotonic())))
        except Failed as failed:
            why = f"time limit of {limit:.0f} s" if time.monotonic() >= end else str(failed)
        finally:
            worker.end()
    return found + [replace(case.record(contender), failure=why or "") for case in cases[len(found) :]]


def prepare(contender: Contender, stand_in: bool) -> Answering:
    """Returns what measures the contender on a case, in the worker's process."""

    def answer(case: Case) -> Record:
        with pretend.gpu() if stand_in else contextlib.nullcontext():
            return measured(contender, case, STAND_IN if stand_in else CUDA)

    return answer


def measured(contender: Contender, case: Case, meter: Meter) -> Record:
    """Measures memory, times and the error of dX. A failure becomes part of the record, and the next case is tried."""
    record = case.record(contender)
    try:
        problem = case.source()
        step = contender.step(problem)
        for _ in range(WARM_UPS - 1):
            step()
        gradients = step()
        assert isinstance(gradients, list)
        if contender.objective in OBJECTIVES:
            few = problem.first(case.error_tokens)
            exact = truth(few, contender.objective, of_head=False).gradients[0]
            found = gradients[0][: len(exact)].double() * (len(problem.student) / len(exact))
            record = replace(record, error_tokens=len(exact), student_error=largest_error(found, exact))
        del gradients
        record = replace(record, peak_bytes=meter.peak_bytes(step))
        return replace(record, seconds=tuple(meter.seconds(step) for _ in range(ROUNDS)))
    except Exception as error:  # a peer may fail in any way, and what failed is part of the report
        return replace(case.record(contender), failure=reason(error))


def most_memory(shape: Shape) -> int:
    """Returns what the schedules may take: blocks within the budget, fp32 accumulators, and the gradients in bf16."""
    blocks = max(GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS * shape.vocab * BYTES_PER_LOGIT)
    gradients = (shape.vocab + shape.tokens) * shape.student_dim * (4 + 2)
    return int(SLACK * (blocks + gradients)) + PRODUCTS_WORKSPACE


def checks(records: Sequence[Record], ours: Sequence[str], cases: Sequence[Case]) -> Iterator[Check]:
    """Checks that ours ran, as exactly and in as little memory as stated, and took no longer than plain PyTorch.

    What of ours was not run has failed; a peer that failed is ignored.
    """
    found = {(record.implementation, record.case): record for record in records}
    for case in cases:
        plain = found.get((PLAIN, case.name))
        for name in ours:
            record, title = found.get((name, case.name)), f"{name}, {case.name}"
            failure = "was not run" if record is None else record.failure
            yield Check(f"{title}: runs", not failure, failure)
            if record is None or record.time is None:
                continue
            error = record.student_error
            exact = error is not None and error <= MOST_ERROR
            yield Check(f"{title}: dX", exact, f"error {error}, at most {MOST_ERROR:.4f}")
            peak, most = record.peak_bytes or 0, most_memory(case.shape)
            yield Check(f"{title}: memory", peak <= most, f"{peak / 2**20:.0f} of {most / 2**20:.0f} MiB")
            if name == ours[0] and plain is not None and plain.time is not None:
                ratio = record.time.median / plain.time.median
                yield Check(f"{title}: time", ratio <= 1, f"{ratio:.2f} of plain PyTorch's")


def write(folder: Path, facts: Mapping[str, str], records: Sequence[Record], made: Sequence[Check]) -> None:
    """Writes report.md to read, results.csv to compute with, checks.csv and environment.txt."""
    (folder / "report.md").write_text(page(facts, records, made))
    (folder / "results.csv").unlink(missing_ok=True)
    append(folder / "results.csv", records)
    with (folder / "checks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f.name for f in fields(Check)], *map(astuple, made)])
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=False)
    (folder / "environment.txt").write_text(frozen.stdout or frozen.stderr)


def page(facts: Mapping[str, str], records: Sequence[Record], made: Sequence[Check]) -> str:
    failed = [check for check in made if not check.passed]
    verdict = f"**{len(failed)} of {len(made)} checks failed.**" if failed else f"All {len(made)} checks passed."
    parts = ["# Acceptance on a GPU", block(facts, [verdict])]
    if failed:
        parts.append(markdown_table(("failed", "detail"), [[c.name, c.detail] for c in failed]))
    for case in dict.fromkeys(record.case for record in records):
        parts += [f"## {case}", gpu_table([record for record in records if record.case == case])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
