"""What measures: a GPU by its events and its allocator, or a clock that stands in for one in the tests of this run."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], object]


class Device(Protocol):
    """Where the matrix runs."""

    device: torch.device

    def seconds(self, step: Step) -> float:
        """One execution of a step."""

    def peak_bytes(self, step: Step) -> int:
        """The most memory allocated while a step runs, beyond what was there before."""

    def facts(self) -> dict[str, str]:
        """What a figure was taken on."""


class Cuda:
    """The current CUDA or ROCm device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def seconds(self, step: Step) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = step()
        stop.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors",
            "runtime": f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
            **software(),
        }


class StandIn:
    """A CPU that takes a GPU's place, to test the run and not to measure anything."""

    device = torch.device("cpu")

    def seconds(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak_bytes(self, step: Step) -> int:
        from ..pretend import PeakMemory

        with PeakMemory() as memory:
            step()
        return memory.peak

    def facts(self) -> dict[str, str]:
        return {"GPU": "none: a CPU stood in for it, no figure here means anything", **software()}


def software() -> dict[str, str]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    return {
        "torch": str(torch.__version__),
        "Triton": triton,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def device(stand_in: bool) -> Device:
    return StandIn() if stand_in else Cuda()
