"""A process for one contender: it prepares itself, waits for its turn, and answers questions.

What one contender leaves behind, memory, thread pools or compiled code, is not there for another, and one that dies
takes nothing with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# From a question to its answer.
Answering = Callable[[Any], Any]


@dataclass(frozen=True)
class Room:
    """What a worker may take, and where its output goes."""

    log: Path  # gets what the process prints
    memory: int | None = None  # bytes it may allocate; None: no limit, as on a GPU, whose driver maps far more


class Failed(Exception):
    """A contender gave no result; the message says why, for a table."""


class Worker:
    """The caller's side of a process. Where an answer takes too long, the process is ended and :class:`Failed` raised.

    The process starts at once. Its first answer, that it is ready, is to be waited for before anything is asked.
    """

    def __init__(self, prepare: Callable[[], Answering], room: Room) -> None:
        """``prepare``: what the process does first, picklable."""
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, prepare, room), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: Any, limit: float) -> Any:
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.connection.send(question)
        return self.answer(limit)

    def answer(self, limit: float) -> Any:
        """Waits for an answer, ``limit`` seconds at most."""
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


def serve(connection: Connection, prepare: Callable[[], Answering], room: Room) -> None:
    """Runs in the process: says that it is ready, then answers questions; the first failure is the last answer."""
    quieten(room.log)
    try:
        if room.memory is not None:
            limit_memory(room.memory)
        answer = prepare()
        connection.send((False, None))
        while True:
            connection.send((False, answer(connection.recv())))
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the next process may need it
    except EOFError:  # the caller has gone
        return
    except BaseException as error:  # a peer may fail in any way, and what failed is part of the report
        connection.send((True, reason(error, room.memory)))


def quieten(log: Path) -> None:
    """Sends what libraries print, at any level, to the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def limit_memory(most: int) -> None:
    """Makes allocations beyond ``most`` fail; if the system runs short all the same, this process is the one to go.

    Files that are mapped, the inputs among them, do not count. Where the system knows no such limits there are none.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def reason(error: BaseException, memory: int | None = None) -> str:
    """Puts an error into one line for a table; ``memory``: the bytes that could be allocated."""
    text = next(iter(str(error).strip().splitlines()), "").replace("|", "/")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: all of the GPU's"
    if memory is not None and (isinstance(error, MemoryError) or "allocate memory" in text):
        return f"out of memory: more than {memory / 2**30:.1f} GiB"
    if type(error).__name__ == "PackageNotFoundError":
        return f"not installed: {str(error).rpartition(' ')[2]}"
    return f"{type(error).__name__}: {text[:160]}"
