"""Several ranks on one machine: each a process with gloo, each with one thread, none of which outlives its test."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.processes import begin_process, start_server

# Longer than the slowest test on a busy machine, shorter than the suite's own limit per test.
TIMEOUT = 120.0


def run_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT, interpreters: bool = False
) -> list[Any]:
    """``function(*arguments)`` on each of so many ranks of a new default group; what they return, by rank.

    ``function`` is one of a module's own, so that a new process finds it; results travel through files. With
    ``interpreters`` each rank is an interpreter and has a seed of ``hash`` of its own, as ranks do in training.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the first failure, with its traceback; the others are ended.
        TimeoutError: the ranks did not end in time; they are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(ranks, folder, timeout, function, arguments, interpreters)
        try:
            if not _joined(context, timeout):
                raise TimeoutError(f"{ranks} ranks of {function.__name__} did not end within {timeout:g} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def start_ranks(
    ranks: int, folder: str, timeout: float, function: Any, arguments: tuple[Any, ...], interpreters: bool = False
) -> Any:
    """What :func:`run_ranks` waits for: the processes, started."""
    start_server()
    given = (ranks, free_port(), folder, timeout, dict(os.environ), function, arguments)
    return start_processes(
        _rank, given, nprocs=ranks, join=False, start_method="spawn" if interpreters else "forkserver"
    )


def _joined(context: Any, timeout: float) -> bool:
    """Whether all ranks ended within the time; raises what one of them raised."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if context.join(timeout=left):  # returns early, with False, as each rank ends
            return True
    return False


def _rank(
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    function: Any,
    arguments: tuple[Any, ...],
) -> None:
    begin_process(environment)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
