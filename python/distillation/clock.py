"""Where the time of a step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Seconds per part since :meth:`start`; an accelerator's queue is waited for at both ends of a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started = self.now()

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - began

    def total(self) -> float:
        return self.now() - self.started
