"""New processes for tests, each a fork of one that has imported what they need and done nothing else.

A new interpreter takes three seconds to import torch, this package and the tests' own modules; a fork takes none. It
has no thread, no compiled code and no memory that a test has used. What forks have in common is the seed of ``hash``:
for that :func:`tests.distributed.processes.run_ranks` starts interpreters.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

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
]

P = ParamSpec("P")
T = TypeVar("T")


def start_server() -> None:
    """The process that is forked, unless it runs already; it ends with this one."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def with_environment(environment: dict[str, str]) -> None:
    """The server has the environment that it was started in."""
    os.environ.clear()
    os.environ.update(environment)


def fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``eopd_kernels.testing.processes.fresh_process``: what a top-level function returns in a new process."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    initial = (dict(os.environ),)
    with ProcessPoolExecutor(1, mp_context=context, initializer=with_environment, initargs=initial) as pool:
        return pool.submit(function, *args, **kwargs).result()
