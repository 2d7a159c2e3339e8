"""Measures one case: the inputs and their truth, a worker for each contender, rounds in which they take turns."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from eopd_kernels.testing.processes import fresh_process

from .contenders import Contender
from .machine import available_memory
from .measure import CPU, CUDA, THREADS, Meter, Sample, progress, rounds
from .problems import HiddenProblem, LogitsProblem, Shape, gradients, hidden_problem, logits_problem
from .records import Case, Record
from .steps import Prepared, Step
from .truth import OBJECTIVES, Errors, Truth, errors, truth
from .worker import Answering, Failed, Room, Worker, reason

# What one process may allocate, of the memory that is there when a case begins; the waiting ones have some, too.
MEMORY_SHARE = 0.75
START_SECONDS = 300.0
# Processes that import and load while another is asked for its memory and errors; nothing is timed then.
AHEAD = 2
# A step that is shorter than this is repeated in its turn, the first time unmeasured: caches and threads were others'.
SHORT = 0.1
REPEATS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What preparing a case found out: bytes of the gradients, and the mean reverse KL where it was computed."""

    gradient_bytes: int
    divergence: float | None


def run(case: Case, device: str = "cpu", log: Path = Path(os.devnull), memory: int | None = None) -> list[Record]:
    """Measures a case. Whatever goes wrong becomes a line of the result.

    ``memory``: bytes that one process may allocate; default: three quarters of what is available.
    """
    folder = Path(tempfile.mkdtemp(prefix="eopd-benchmark-"))
    memory = memory or int(MEMORY_SHARE * available_memory())
    try:
        given = fresh_process(prepare, case, folder)
        return measure(case, device, folder, Room(log, memory if device == "cpu" else None), given)
    except Exception as error:  # no inputs: a package may be missing, or memory
        why = f"no inputs: {reason(error, memory)}"
        progress(f"  {why}")
        return [replace(case.record(contender), failure=why) for contender in case.contenders]
    finally:
        shutil.rmtree(folder)


def prepare(case: Case, folder: Path) -> Given:
    """Writes the problem, and the truth of its first tokens for each objective that a contender computes."""
    problem = case.source()
    save(problem, folder / "problem.pt")
    gradient_bytes = sum(leaf.nbytes for leaf in problem.leaves)
    if not case.error_tokens:
        return Given(gradient_bytes, None)
    few = problem.first(case.error_tokens)
    computed = {c.objective for c in case.contenders if c.loss is not None and c.objective in OBJECTIVES}
    for objective in computed | {"reverse"}:
        exact = truth(few, objective)
        if objective == "reverse":
            divergence = float(exact.loss)
        if objective in computed:
            torch.save((exact.loss, exact.gradients, case.error_tokens), truth_file(folder, objective))
    return Given(gradient_bytes, divergence)


def measure(case: Case, device: str, folder: Path, room: Room, given: Given) -> list[Record]:
    """Measures memory and errors of one contender after the other, then the times of all in turn."""
    records = {contender.name: case.record(contender) for contender in case.contenders}
    workers: dict[str, Worker] = {}

    def failed(name: str, why: object) -> None:
        records[name] = replace(records[name], failure=str(why), peak_bytes=None, seconds=())
        workers.pop(name, None)
        progress(f"  {name}: {why}")

    for contender in case.contenders:
        if why := contender.refusal(device):
            failed(contender.name, why)
    able = [contender for contender in case.contenders if not records[contender.name].failure]
    starting = iter(able)

    def start(processes: int) -> None:
        for contender in islice(starting, processes):
            workers[contender.name] = Worker(partial(answering, contender, folder, device), room)

    try:
        start(AHEAD)
        for contender in able:
            start(1)
            name = contender.name
            try:
                workers[name].answer(START_SECONDS)
                records[name] = observed(workers[name], contender, case, given)
            except Failed as failure:
                failed(name, failure)
                continue
            memory = records[name].memory
            progress(f"  {name}: {f'{memory} beyond inputs and gradients' if memory else 'ready'}")

        def clock(name: str) -> float | None:
            try:
                return workers[name].ask("seconds", case.limit)
            except Failed as why:
                failed(name, why)
                return None

        clocks = {name: partial(clock, name) for name in workers}
        for name, seconds in rounds(clocks, case.seconds, case.patience).items():
            records[name] = replace(records[name], seconds=tuple(seconds))
            progress(f"  {name}: {Sample(tuple(seconds), 's')}, {len(seconds)} rounds")
    finally:
        for worker in workers.values():
            worker.end()
    return list(records.values())


def observed(worker: Worker, contender: Contender, case: Case, given: Given) -> Record:
    """Asks for everything but the times."""
    record = case.record(contender)
    peak = worker.ask("peak", case.limit)
    if contender.loss is not None:
        of_results = given.gradient_bytes if contender.prepare is None else 0
        record = replace(record, peak_bytes=peak, gradient_bytes=of_results)
    found = worker.ask("errors", case.limit) if case.error_tokens else None
    if found is None:
        return record
    return replace(
        record,
        error_tokens=min(case.error_tokens, case.shape.tokens),
        divergence=given.divergence,
        loss_error=found.loss,
        student_error=found.student,
        weight_error=found.weight,
    )


def answering(contender: Contender, folder: Path, device: str) -> Answering:
    """Loads the inputs of ``folder``, warms the libraries and prepares the step.

    Returns what answers the questions "peak" (bytes), "errors" and "seconds".
    """
    torch.set_num_threads(THREADS)
    meter = CUDA if device == "cuda" else CPU
    problem = load(folder / "problem.pt", device)
    if not contender.compiles:
        # Thread pools and the products' own buffers are there from now on.
        measured(meter.seconds, contender.step(tiny(problem)))
    step = contender.step(problem)

    def peak() -> int:
        if contender.compiles:
            step()
        read_in(problem)  # those before may have needed the memory
        return measured(meter.peak_bytes, step)

    answers: dict[str, Callable[[], object]] = {
        "peak": peak,
        "errors": lambda: measured_errors(contender, problem, folder),
        "seconds": lambda: turn(meter, step),
    }
    return lambda question: answers[question]()


def measured_errors(contender: Contender, problem: LogitsProblem, folder: Path) -> Errors | None:
    """Compares the contender's result for the first tokens with the truth; None where there is no truth."""
    path = truth_file(folder, contender.objective)
    if contender.loss is None or not path.exists():
        return None
    loss, exact_gradients, tokens = torch.load(path, mmap=True)
    few = problem.first(tokens)
    value = contender.loss(few)
    return errors(value.cpu(), gradients(value, few.leaves), Truth(loss, exact_gradients))


def turn(meter: Meter, step: Step) -> float:
    """Returns the seconds of a step."""
    first = measured(meter.seconds, step)
    if meter.device == "cpu" and first > SHORT:
        return first
    return statistics.median(measured(meter.seconds, step) for _ in range(REPEATS))


def measured(measure: Callable[[Step], T], step: Step) -> T:
    """Measures a step, after what it uses up was laid out anew."""
    if isinstance(step, Prepared):
        step.prepare()
        return measure(step.step)
    return measure(step)


def save(problem: LogitsProblem, path: Path) -> None:
    """Writes a problem for :func:`load` in other processes."""
    torch.save(problem.sides, path)


def load(path: Path, device: str) -> LogitsProblem:
    """Reads a problem. All processes share the pages of the file, which are read in here."""
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    sides = torch.load(path, mmap=True)
    kind = HiddenProblem if "student_weight" in sides else LogitsProblem
    read_in(problem := kind(**sides))
    return problem.with_sides({name: side.to(device) for name, side in sides.items()})


def read_in(problem: LogitsProblem) -> None:
    """Reads a number of each page of the inputs, which count as a step's where the step is the first to read them."""
    for side in problem.sides.values():
        side.detach().view(-1)[:: mmap.PAGESIZE // side.element_size()].sum()


def tiny(problem: LogitsProblem) -> LogitsProblem:
    """Returns a problem of the same kind, dtype and device that costs nothing."""
    if isinstance(problem, HiddenProblem):
        small: LogitsProblem = hidden_problem(Shape(8, 64, 16, 16), problem.student.dtype)
    else:
        small = logits_problem(4, 64)
    return small.with_sides({name: side.to(problem.student.device) for name, side in small.sides.items()})


def truth_file(folder: Path, objective: str) -> Path:
    return folder / f"truth {objective}.pt"
