"""A process for one implementation on one problem: it has its inputs, waits for its turn, and says what it measured.

What one implementation leaves behind, memory, thread pools or compiled code, is not there for another, and one that
dies takes nothing with it.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from .gpu.device import Cuda
from .implementations import Implementation
from .measure import MIB, THREADS, peak_memory, timed
from .problems import HiddenProblem, LogitsProblem, Problem, hidden_problem, logits_problem
from .steps import Prepared, Step, gradients
from .truth import Errors, Truth, errors, first_tokens

# A step that is shorter than this is repeated in its turn, the first time unmeasured: caches and threads were others'.
SHORT = 0.1
REPEATS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Room:
    """Where a worker finds its inputs, and what it may take.

    Args:
        folder: of the problem's and the truths' files.
        device: "cpu" or "cuda".
        memory: bytes of its own that it may allocate on a CPU.
        log: what it prints goes there.
    """

    folder: Path
    device: str
    memory: int
    log: Path


class Failed(Exception):
    """An implementation gave no result; the message says why, for a table."""


class Meter(Protocol):
    """What measures on a kind of device."""

    device: torch.device

    def seconds(self, step: Step) -> float:
        """Of one step."""

    def peak_bytes(self, step: Step) -> int:
        """The most memory that a step takes, beyond what was there before."""


class Host:
    """The CPU: the clock on the wall, and the resident memory of this process."""

    device = torch.device("cpu")

    def seconds(self, step: Step) -> float:
        return timed(step)

    def peak_bytes(self, step: Step) -> int:
        return peak_memory(step)


class Worker:
    """The caller's side. An answer has a time limit; without one the process is ended and :class:`Failed` raised.

    The process starts at once. Its first answer, that it is ready, is to be waited for before anything is asked.
    """

    def __init__(self, implementation: Implementation, room: Room) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, implementation, room), daemon=True)
        self.process.start()
        theirs.close()
        self.memory = room.memory

    def ask(self, question: str, limit: float) -> Any:
        """``question``: "peak", "errors" or "seconds"."""
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.connection.send(question)
        return self.answer(limit)

    def answer(self, limit: float) -> Any:
        try:
            if self.connection.poll(limit):
                failed, answer = self.connection.recv()
            else:
                self.process.kill()
                failed, answer = True, f"out of time: more than {limit:.0f} s"
        except (EOFError, ConnectionResetError):
            self.process.join(1)
            failed, answer = True, ended(self.process.exitcode)
        if failed:
            self.end()
            raise Failed(answer)
        return answer

    def end(self) -> None:
        """Lets the process end by itself, and ends it if it does not."""
        self.connection.close()
        self.process.join(2)
        self.process.kill()
        self.process.join()


def ended(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "out of memory: the system killed the process"
    return f"the process ended with status {status}"


def serve(connection: Connection, implementation: Implementation, room: Room) -> None:
    """The process's side: ready, then an answer to each question; the first failure is the last answer."""
    quieten(room.log)
    try:
        answers = prepare(implementation, room)
        connection.send((False, None))
        while True:
            connection.send((False, answers[connection.recv()]()))
            if room.device == "cuda":
                torch.cuda.empty_cache()  # the next process may need it
    except EOFError:  # the caller has gone
        return
    except BaseException as error:  # a peer may fail in any way, and what failed is part of the report
        connection.send((True, reason(error, room.memory)))


def prepare(implementation: Implementation, room: Room) -> Mapping[str, Callable[[], Any]]:
    """The inputs in memory, the libraries warm, the step ready; and what answers each question."""
    torch.set_num_threads(THREADS)
    meter: Meter = Cuda() if room.device == "cuda" else Host()
    if room.device == "cpu":
        limit_memory(room.memory)
    problem = load(room.folder / "problem.pt", meter.device)
    if not implementation.compiles:
        # Thread pools and the products' own buffers are there from now on.
        measured(meter.seconds, implementation.step(tiny(problem)))
    step = implementation.step(problem)

    def peak() -> int:
        if implementation.compiles:
            step()
        return measured(meter.peak_bytes, step)

    return {
        "peak": peak,
        "errors": lambda: measured_errors(implementation, problem, room.folder),
        "seconds": lambda: turn(meter, step),
    }


def measured_errors(implementation: Implementation, problem: Problem, folder: Path) -> Errors | None:
    """None where there is no truth to compare with."""
    path = truth_file(folder, implementation.objective)
    if implementation.loss is None or not path.exists():
        return None
    loss, exact_gradients, tokens = torch.load(path, mmap=True)
    few = first_tokens(problem, tokens)
    value = implementation.loss(few)
    return errors(value.cpu(), gradients(value, *few.leaves), Truth(loss, exact_gradients))


def turn(meter: Meter, step: Step) -> float:
    """Seconds of a step."""
    first = measured(meter.seconds, step)
    if meter.device.type == "cpu" and first > SHORT:
        return first
    return statistics.median(measured(meter.seconds, step) for _ in range(REPEATS))


def measured(measure: Callable[[Step], T], step: Step) -> T:
    """What a step uses up is laid out before."""
    if isinstance(step, Prepared):
        step.prepare()
        return measure(step.step)
    return measure(step)


def save(problem: Problem, path: Path) -> None:
    """For :func:`load` in other processes."""
    torch.save({name: value.detach() for name, value in vars(problem).items()}, path)


def load(path: Path, device: torch.device) -> Problem:
    """The problem that was saved. All processes share the pages of the file, which are read in here."""
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    sides = torch.load(path, mmap=True)
    for side in sides.values():
        side.view(-1)[:: mmap.PAGESIZE // side.element_size()].sum()
    sides = {name: side.to(device) for name, side in sides.items()}
    problem = HiddenProblem(**sides) if "student_weight" in sides else LogitsProblem(**sides)
    for leaf in problem.leaves:
        leaf.requires_grad_()
    return problem


def tiny(problem: Problem) -> Problem:
    """A problem of the same kind, dtype and device that costs nothing."""
    if isinstance(problem, LogitsProblem):
        small: Problem = logits_problem(4, 64)
    else:
        small = hidden_problem(8, 64, 16, problem.student.dtype)
    sides = {name: side.detach().to(problem.student.device) for name, side in vars(small).items()}
    small = type(problem)(**sides)
    for leaf in small.leaves:
        leaf.requires_grad_()
    return small


def truth_file(folder: Path, objective: str) -> Path:
    return folder / f"truth {objective}.pt"


def quieten(log: Path) -> None:
    """What libraries print, at any level, goes into the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def limit_memory(most: int) -> None:
    """Allocations beyond ``most`` fail; if the system runs short all the same, this process is the one to go.

    Files that are mapped, the inputs among them, do not count. Where the system knows no such limits there are none.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def reason(error: BaseException, memory: int) -> str:
    """One line for a table."""
    text = next(iter(str(error).strip().splitlines()), "").replace("|", "/")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: all of the GPU's"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory: more than {memory / MIB / 1024:.1f} GiB"
    if type(error).__name__ == "PackageNotFoundError":
        return f"not installed: {str(error).rpartition(' ')[2]}"
    return f"{type(error).__name__}: {text[:160]}"
