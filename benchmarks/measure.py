"""Everything that measures: interleaved times, peak memory, and the fresh processes both are taken in."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from .steps import Prepared, Step

THREADS = 2
LEAST_ROUNDS, MOST_ROUNDS = 3, 40
LONG_ROUND = 60.0  # seconds
# Where there is no patience for more rounds of all, the quick ones have some among themselves.
QUICK_ROUNDS, SLOW = 9, 2.0
MIB = 2**20

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, in seconds, MiB or as a ratio ("x")."""

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __truediv__(self, other: Sample) -> Sample:
        """The ratio within each round that both have: what slows the machine down for a while slows both."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=False)), "x")

    def __str__(self) -> str:
        factor, unit, separator = (1.0, self.unit, " ") if self.unit != "x" else (1.0, "x", "")
        if self.unit == "s" and self.median < 1:
            factor, unit = 1e3, "ms"
        low, middle, high = (significant(factor * v) for v in (min(self.values), self.median, max(self.values)))
        spread = f" ({low}–{high})" if len(self.values) > 1 else ""
        return f"{middle}{separator}{unit}{spread}"


def significant(value: float) -> str:
    """Three significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def interleaved(steps: Mapping[str, Step], seconds: float) -> dict[str, Sample]:
    """Times steps of this process in :func:`rounds` after one warm-up each."""
    torch.set_num_threads(THREADS)
    for name, step in steps.items():
        progress(f"  warm-up: {name} {timed(step):.3f} s")
    times = rounds({name: partial(timed, step) for name, step in steps.items()}, seconds)
    for name, values in times.items():
        progress(f"  {name}: {Sample(tuple(values), 's')}, {len(values)} rounds")
    return {name: Sample(tuple(values), "s") for name, values in times.items()}


def rounds(
    clocks: Mapping[str, Callable[[], float | None]], seconds: float, patience: float = LONG_ROUND
) -> dict[str, list[float]]:
    """Asks clocks in turn, A B C A B C ..., until ``seconds`` have gone: at least 3 rounds, at most 40.

    Once the rounds have taken more than ``patience`` seconds, be there only one, those that took more than twice as
    long as the quickest leave. The others have rounds of their own, until they have 9 in all or the patience is over
    once more. A clock that answers None has failed: it is asked no more and has no times, while the others go on.
    """
    times: dict[str, list[float]] = {name: [] for name in clocks}
    begin, of_all = time.perf_counter(), math.inf  # seconds that the rounds of all have taken
    for done in range(MOST_ROUNDS):
        elapsed = time.perf_counter() - begin
        if done > 0 and elapsed > patience:
            of_all = min(of_all, elapsed)
        impatient = elapsed >= of_all
        if not times or (done >= LEAST_ROUNDS and elapsed > seconds and not impatient):
            break
        if impatient and (done >= QUICK_ROUNDS or elapsed > of_all + patience):
            break
        for name in quick(times) if impatient else list(times):
            value = clocks[name]()
            if value is None:
                del times[name]
            else:
                times[name].append(value)
    return times


def quick(times: Mapping[str, Sequence[float]]) -> list[str]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [name for name, median in medians.items() if median <= SLOW * min(medians.values())]


def timed(step: Step) -> float:
    """Seconds of one step; what a ``Prepared`` one needs first is outside the clock."""
    if isinstance(step, Prepared):
        step.prepare()
    begin = time.perf_counter()
    result = step()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def peak_memory(step: Step) -> int:
    """Bytes by which the resident memory of this process grows at most during the step."""
    gc.collect()
    release_free_memory()
    if reset_peak():
        before = status_bytes("VmRSS")
        result = step()
        peak = status_bytes("VmHWM")
    else:
        # Blind to what stays below an earlier peak of the process: hence the fresh process for each measurement.
        before = max_resident()
        result = step()
        peak = max_resident()
    del result
    return peak - before


def release_free_memory() -> None:
    """Gives pages that malloc has kept back to the system: filling them again must count."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Sets VmHWM back to the present resident memory, where the kernel offers that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def status_bytes(field: str) -> int:
    """A line of /proc/self/status that is given in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def max_resident() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a top-level function returns in a new interpreter: no memory, thread pool or compiled code is inherited."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def progress(text: str) -> None:
    """A line for whoever waits; the results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)
