"""Runs a function in a new process, and measures the peak of this process's resident memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

MIB = 2**20

P = ParamSpec("P")
T = TypeVar("T")


def fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a top-level function in a new interpreter, which inherits no memory, thread pool or compiled code."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_memory(step: Callable[[], object]) -> int:
    """Returns the bytes by which the resident memory of this process grows at most while ``step`` runs."""
    gc.collect()
    release_free_memory()
    if reset_peak():
        before = status_bytes("VmRSS")
        result = step()
        peak = status_bytes("VmHWM")
    else:
        # An earlier peak of this process hides everything below it, hence a fresh process for each measurement.
        before = max_resident()
        result = step()
        peak = max_resident()
    del result
    return peak - before


def release_free_memory() -> None:
    """Returns the free pages of malloc to the system, so that filling them again counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Sets VmHWM back to the present resident memory; False where the system does not offer that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def status_bytes(field: str) -> int:
    """Reads a field of /proc/self/status that is given in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def max_resident() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
