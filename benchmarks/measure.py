"""Measures the time and the peak memory of steps, which take turns in rounds."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from eopd_kernels.testing.pretend import PeakMemory
from eopd_kernels.testing.processes import peak_memory

from .steps import Step

THREADS = 2
LEAST_ROUNDS, MOST_ROUNDS = 3, 40
LONG_ROUND = 60.0  # seconds
# Where there is no patience for more rounds of all, the quick ones have some among themselves.
QUICK_ROUNDS, SLOW = 9, 2.0
SLEEP_CYCLES = 40_000_000  # of a GPU: 20 ms, in which a host hands over any step


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
    """Formats three significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def timed(step: Step) -> float:
    """Returns the seconds of one step. What it returns is freed outside the clock."""
    begin = time.perf_counter()
    result = step()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def gpu_seconds(step: Step) -> float:
    """Returns the seconds of one step on the current CUDA or ROCm device, by its events.

    The device sleeps while the host fills its queue, so that the host's time is not among them. What a step waits for
    itself is.
    """
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    result = step()
    stop.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def gpu_host_seconds(step: Step) -> float:
    """Returns the seconds that the host takes to hand one step to an idle device."""
    torch.cuda.synchronize()
    return timed(step)


def gpu_peak_memory(step: Step) -> int:
    """Returns the most bytes that the GPU's allocator gives out during a step, beyond what it had given out before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak_of_tensors(step: Step) -> int:
    """Returns the most bytes of tensors that a step has at one time."""
    with PeakMemory() as memory:
        step()
    return memory.peak


class Meter(NamedTuple):
    """What measures the seconds of a step, the most memory beyond what was there before, and the host's seconds."""

    device: str
    seconds: Callable[[Step], float]
    peak_bytes: Callable[[Step], int]
    host_seconds: Callable[[Step], float] = timed


CPU = Meter("cpu", timed, peak_memory)
CUDA = Meter("cuda", gpu_seconds, gpu_peak_memory, gpu_host_seconds)
# A CPU in a GPU's place, to test the acceptance run and not to measure anything.
STAND_IN = Meter("cpu", timed, peak_of_tensors)


def rounds(
    clocks: Mapping[str, Callable[[], float | None]], seconds: float, patience: float = LONG_ROUND
) -> dict[str, list[float]]:
    """Asks clocks in turn, A B C A B C ..., until ``seconds`` have gone: at least 3 rounds, at most 40.

    Once the rounds have taken more than ``patience`` seconds, even if there was only one, those that took more than
    twice as long as the quickest leave. The others have rounds of their own, until they have 9 in all or the patience
    is over once more. A clock that answers None has failed: it is asked no more and has no times.
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
    """Returns the names whose median is at most twice the smallest."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [name for name, median in medians.items() if median <= SLOW * min(medians.values())]


def progress(text: str) -> None:
    """Prints a line for whoever waits to stderr; the results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)
