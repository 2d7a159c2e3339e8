"""New processes for tests, each a fork of one that has imported what they need and done nothing else.

A new interpreter takes three seconds to import torch, this package and the tests' own modules; a fork takes none. It
has no thread, no compiled code and no memory that a test has used. What forks have in common is the seed of ``hash``:
for that :func:`tests.distributed.processes.run_ranks` starts interpreters.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = [
    "tests.conftest",
    "tests.distributed.shards",
    "tests.distributed.traffic",
    "tests.distributed.training",
    "eopd_kernels.testing.pretend",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "tests.python.recipe",
    "benchmarks.run",
]

P = ParamSpec("P")
T = TypeVar("T")


def start_server() -> None:
    """The process that is forked, unless it runs already; it ends with this one."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def begin_process(environment: dict[str, str]) -> None:
    """What a new process does first: a fork's environment is still the one that the server was started in, and torch
    mends the thread pool that it has inherited. Left to the threads of autograd, which mend it at the same time, torch
    2.15 fails at times with "Invalid thread pool!"."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``eopd_kernels.testing.processes.fresh_process``: what a top-level function returns in a new process."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    initial = (dict(os.environ),)
    with ProcessPoolExecutor(1, mp_context=context, initializer=begin_process, initargs=initial) as pool:
        return pool.submit(function, *args, **kwargs).result()


def fork_what_is_spawned(patch: pytest.MonkeyPatch) -> None:
    """Processes that code under test would start as new interpreters are forks, as long as ``patch`` holds."""
    start_server()
    get_context = multiprocessing.get_context
    patch.setattr(multiprocessing, "get_context", lambda method=None: get_context(method and "forkserver"))


def run_programs(
    programs: Sequence[tuple[str, Sequence[str]]], environments: Sequence[Mapping[str, str]], timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Runs modules as programs, all at once, each in a fork: ``python -m MODULE ARGUMENT ...`` without an interpreter
    that starts and imports.

    ``environments``: what each has beside this process's own. Returns the status of the first that failed, or 0, and
    what they printed, one after the other.

    Raises:
        TimeoutExpired: some did not end in time; all are ended.
    """
    start_server()
    context: Any = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        streams = [(Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(len(programs))]
        processes = []
        for program, more, printed in zip(programs, environments, streams, strict=True):
            given = ({**os.environ, **more}, os.getcwd(), printed, *program)
            processes.append(context.Process(target=_program, args=given))
            processes[-1].start()
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        out, err = ("".join(files[i].read_text() for files in streams) for i in range(2))
    words = [word for program, more in programs for word in (program, *more)]
    if None in codes:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), out, err)


def run_program(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As :func:`run_programs`, one."""
    return run_programs([(module, arguments)], [{}])


def _program(
    environment: dict[str, str], folder: str, printed: tuple[Path, Path], module: str, arguments: Sequence[str]
) -> None:
    begin_process(environment)
    os.chdir(folder)
    for stream, file in zip((1, 2), printed, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [module, *arguments]
    gc.freeze()  # what was there before is not looked through
    runpy.run_module(module, run_name="__main__", alter_sys=True)
