"""One case: the inputs and their truth, a worker for each implementation, rounds in which they take turns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from .case import Case
from .implementations import Implementation
from .machine import available_memory
from .measure import Sample, fresh_process, progress, rounds
from .records import Record
from .truth import OBJECTIVES, first_tokens, truth
from .worker import Failed, Room, Worker, reason, save, truth_file

# What one process may allocate, of the memory that is there when a case begins; the waiting ones have some, too.
MEMORY_SHARE = 0.75
START_SECONDS = 300.0
# Processes that import and load while another is asked for its memory and errors; nothing is timed then.
AHEAD = 2


@dataclass(frozen=True)
class Given:
    """What preparing a case found out: bytes of the gradients, and the mean reverse KL where it was computed."""

    gradient_bytes: int
    divergence: float | None


def run(case: Case, device: str, log: Path, memory: int | None = None) -> list[Record]:
    """Measures a case. Whatever goes wrong becomes a line of the result.

    ``memory``: bytes that one process may allocate; default: three quarters of what is available.
    """
    folder = Path(tempfile.mkdtemp(prefix="eopd-benchmark-"))
    room = Room(folder, device, memory or int(MEMORY_SHARE * available_memory()), log)
    try:
        given = fresh_process(prepare, case, folder)
        return measure(case, room, given)
    except Exception as error:  # no inputs: a package may be missing, or memory
        why = f"no inputs: {reason(error, room.memory)}"
        progress(f"  {why}")
        return [replace(case.record(implementation), failure=why) for implementation in case.implementations]
    finally:
        shutil.rmtree(folder)


def prepare(case: Case, folder: Path) -> Given:
    """Writes the problem, and the truth of its first tokens for each objective that someone computes."""
    problem = case.source()
    save(problem, folder / "problem.pt")
    gradient_bytes = sum(leaf.nbytes for leaf in problem.leaves)
    if not case.error_tokens:
        return Given(gradient_bytes, None)
    few = first_tokens(problem, case.error_tokens)
    computed = {i.objective for i in case.implementations if i.loss is not None and i.objective in OBJECTIVES}
    for objective in computed | {"reverse"}:
        exact = truth(few, objective)
        if objective == "reverse":
            divergence = float(exact.loss)
        if objective in computed:
            torch.save((exact.loss, exact.gradients, case.error_tokens), truth_file(folder, objective))
    return Given(gradient_bytes, divergence)


def measure(case: Case, room: Room, given: Given) -> list[Record]:
    """Memory and errors of one implementation after the other, then the times of all in turn."""
    records = {implementation.name: case.record(implementation) for implementation in case.implementations}
    workers: dict[str, Worker] = {}

    def failed(name: str, why: Failed) -> None:
        records[name] = replace(records[name], failure=str(why), peak_bytes=None, seconds=())
        workers.pop(name, None)
        progress(f"  {name}: {why}")

    able: list[Implementation] = []
    for implementation in case.implementations:
        if why := implementation.refusal(room.device):
            failed(implementation.name, Failed(why))
        else:
            able.append(implementation)
    starting = iter(able)

    def start(processes: int) -> None:
        for implementation in islice(starting, processes):
            workers[implementation.name] = Worker(implementation, room)

    try:
        start(AHEAD)
        for implementation in able:
            start(1)
            name = implementation.name
            try:
                workers[name].answer(START_SECONDS)
                records[name] = observed(workers[name], implementation, case, given)
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

        clocks = {name: (lambda name=name: clock(name)) for name in workers}
        for name, seconds in rounds(clocks, case.seconds, case.patience).items():
            records[name] = replace(records[name], seconds=tuple(seconds))
            progress(f"  {name}: {Sample(tuple(seconds), 's')}, {len(seconds)} rounds")
    finally:
        end(workers.values())
    return list(records.values())


def observed(worker: Worker, implementation: Implementation, case: Case, given: Given) -> Record:
    """All but the times."""
    record = case.record(implementation)
    peak = worker.ask("peak", case.limit)
    if implementation.loss is not None:
        of_results = given.gradient_bytes if implementation.prepare is None else 0
        record = replace(record, peak_bytes=peak, gradient_bytes=of_results)
    found = worker.ask("errors", case.limit) if case.error_tokens else None
    if found is None:
        return record
    return replace(
        record,
        error_tokens=min(case.error_tokens, case.tokens),
        divergence=given.divergence,
        loss_error=found.loss,
        student_error=found.student,
        weight_error=found.weight,
    )


def end(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.end()
