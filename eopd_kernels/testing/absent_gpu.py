"""Compiles the Triton kernels for GPUs that are not there.

The launches are the backend's own (``launch.py``), so that dtypes, options and specialisations are exactly those of a
real call; only the driver is replaced, and compiling takes the place of launching. Not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ..backends import triton as backend
from ..backends.triton import launch
from ..backends.triton.table import Processor
from ..rows import FUNCTIONS


@dataclass(frozen=True)
class Device:
    """A compilation target, the properties that tilings depend on, and the most shared memory of a program in bytes."""

    target: GPUTarget
    processor: Processor
    shared_limit: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), Processor(108, 32), 163 * 1024),
    "sm_90": Device(GPUTarget("cuda", 90, 32), Processor(132, 32), 227 * 1024),
    "sm_100": Device(GPUTarget("cuda", 100, 32), Processor(148, 32), 227 * 1024),
    "sm_120": Device(GPUTarget("cuda", 120, 32), Processor(188, 32), 99 * 1024),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), Processor(304, 64, amd=True), 64 * 1024),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# V and the padding of each row: all multiples of 16 bytes; rows longer than the vocabulary; neither; a single column.
LAYOUTS = {"even": (4096, 0), "ragged": (4095, 17), "odd": (4095, 0), "one column": (1, 0)}


@dataclass(frozen=True)
class Variant:
    """The options that kernels are specialised on.

    Args:
        student, teacher, out: dtypes, as named in :data:`DTYPES`.
        softcaps: whether student and teacher have one.
        layout: a key of :data:`LAYOUTS`.
        skewed: whether the forward and the reverse half of a mixture are skewed.
    """

    student: str
    teacher: str
    out: str
    softcaps: tuple[bool, bool] = (False, False)
    layout: str = "even"
    skewed: tuple[bool, bool] = (True, True)

    def __str__(self) -> str:
        names = ("student", "teacher")
        capped = [f"{name} softcap" for name, softcap in zip(names, self.softcaps, strict=True) if softcap]
        plain = [
            f"plain {name}" for name, skewed in zip(("forward", "reverse"), self.skewed, strict=True) if not skewed
        ]
        return ", ".join([f"{self.student} {self.teacher} → {self.out}", *capped, *plain, self.layout])

    @property
    def loads_16_bits(self) -> bool:
        """Whether both sides hold 16 bits, aligned: a load of fewer than 32 is then one that was not vectorised."""
        return self.layout == "even" and {self.student, self.teacher} <= {"bf16", "fp16"}

    def tensors(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns student, teacher and out, uninitialised."""
        vocab_size, padding = LAYOUTS[self.layout]
        student, teacher, out = (
            torch.empty(rows, vocab_size + padding, dtype=DTYPES[name])[:, :vocab_size]
            for name in (self.student, self.teacher, self.out)
        )
        return student, teacher, out

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if "fp64" in (self.student, self.teacher) else torch.float32

    @property
    def skews(self) -> list[float]:
        forward, reverse = self.skewed
        return [0.1 * forward, 0.2 * reverse]

    @property
    def transforms(self) -> list[float]:
        student, teacher = (30.0 * softcap for softcap in self.softcaps)
        return [1.0, student, 1.0, 1.0, teacher, 1.0]


class AbsentDriver:
    """Answers what ``triton.jit`` asks a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(device: Device) -> Iterator[list[Any]]:
    """Makes the backend's launches compile instead, and collects the compiled kernels in a list."""
    compiled: list[Any] = []

    def instead(kernel: Any, grid: Any) -> Any:
        return lambda **arguments: compiled.append(kernel.run(grid=grid, warmup=True, **arguments))

    triton.runtime.driver.set_active(AbsentDriver(device.target))
    with (
        mock.patch.object(JITFunction, "__getitem__", instead),
        mock.patch.object(backend, "takes", lambda device_of_tensors: True),
        mock.patch.object(launch, "processor_of", lambda device_of_tensors: device.processor),
    ):
        yield compiled


# Few rows are split over programs: 512 on no device, one on all.
WHOLE_ROWS, SPLIT_ROWS = 512, 1


def call(function: str, variant: Variant, rows: int) -> None:
    """Calls one of the backend's row functions on uninitialised tensors."""
    student, teacher, out = variant.tensors(rows)
    transforms = variant.transforms
    statistics = torch.empty(rows, 8, dtype=variant.compute)
    per_row = torch.empty(rows, dtype=variant.compute)
    after_the_sides = {
        "row_statistics": (transforms,),
        "row_gradient": (statistics, per_row, per_row, per_row, transforms, out),
        "row_loss_and_gradient": (per_row, 0.8, [1.0, 0.0, 0.0, 1.0], transforms, out),
        "row_mixture": (statistics, variant.skews, transforms),
        "row_mixture_gradient": (statistics, per_row, per_row, per_row, variant.skews, transforms, out),
    }
    getattr(FUNCTIONS["triton"], function)(student, teacher, *after_the_sides[function])
