"""Compiles what the Triton backend would launch, for GPUs that are not there, and reads the machine code.

The launches are the backend's own (``launch.py``), so that dtypes, options and specialisations are exactly those of a
real call; only the driver is replaced, and compiling takes the place of launching. Not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from eopd_kernels.backends import triton as backend
from eopd_kernels.backends.triton import launch
from eopd_kernels.backends.triton.table import Processor
from eopd_kernels.rows import FUNCTIONS


@dataclass(frozen=True)
class Device:
    """A target, what the backend's table wants to know of it, and the shared memory a program may have there."""

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
# How the rows lie: begin and length multiples of 16 bytes; a row longer than the vocabulary; neither; a single column.
LAYOUTS = {"even": (4096, 0), "ragged": (4095, 17), "odd": (4095, 0), "one column": (1, 0)}


@dataclass(frozen=True)
class Problem:
    """The options of one call: dtypes by Triton's names, softcaps of student and teacher, a layout of ``LAYOUTS``, and
    which halves of a mixture are skewed, forward and reverse."""

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
        """Both sides hold 16 bits, aligned: then a load of fewer than 32 is one that was not made a vector."""
        return self.layout == "even" and {self.student, self.teacher} <= {"bf16", "fp16"}

    def tensors(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """student, teacher and out, uninitialised."""
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
    """What ``triton.jit`` asks a driver before it compiles."""

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
    """Within it the backend's launches compile, and their kernels are appended to the list."""
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


# Few rows are split over programs; this many are split on no device, and one is on all.
WHOLE_ROWS, SPLIT_ROWS = 512, 1


def call(function: str, problem: Problem, rows: int) -> None:
    """One of the backend's functions, on uninitialised tensors."""
    student, teacher, out = problem.tensors(rows)
    transforms = problem.transforms
    statistics = torch.empty(rows, 8, dtype=problem.compute)
    per_row = torch.empty(rows, dtype=problem.compute)
    after_the_sides = {
        "row_statistics": (transforms,),
        "row_gradient": (statistics, per_row, per_row, per_row, transforms, out),
        "row_loss_and_gradient": (per_row, 0.8, [1.0, 0.0, 0.0, 1.0], transforms, out),
        "row_mixture": (statistics, problem.skews, transforms),
        "row_mixture_gradient": (statistics, per_row, per_row, per_row, problem.skews, transforms, out),
    }
    getattr(FUNCTIONS["triton"], function)(student, teacher, *after_the_sides[function])


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its device; registers per thread, stack (spills) and shared memory in bytes."""

    kernel: str
    device: str
    problem: str
    registers: int
    stack: int
    shared: int
    shared_limit: int
    instructions: int
    load_bits: tuple[int, ...]  # the widths of its global loads, ascending
    narrow_loads: bool  # whether a 16-bit logit is loaded by itself where it need not be

    @property
    def sound(self) -> bool:
        return self.stack == 0 and self.shared <= self.shared_limit and not self.narrow_loads


def resources(function: str, problem: Problem, rows: int, device: str) -> list[Resources]:
    """Of each kernel that the call launches."""
    with compiling_for(DEVICES[device]) as compiled:
        call(function, problem, rows)
    result = []
    for kernel in compiled:
        if kernel.hash not in READ:
            READ[kernel.hash] = (read_amdgcn if "amdgcn" in kernel.asm else read_cubin)(kernel)
        registers, stack, instructions, load_bits = READ[kernel.hash]
        result.append(
            Resources(
                kernel.metadata.name.removesuffix("_kernel"),
                device,
                str(problem),
                registers,
                stack,
                kernel.metadata.shared,
                DEVICES[device].shared_limit,
                instructions,
                load_bits,
                problem.loads_16_bits and min(load_bits, default=32) < 32,
            )
        )
    return result


# What has been read of a kernel: several calls launch the same one.
READ: dict[str, tuple[int, int, int, tuple[int, ...]]] = {}


def read_cubin(kernel: Any) -> tuple[int, int, int, tuple[int, ...]]:
    """Registers, stack and local memory, instructions, widths of the global loads, as NVIDIA's disassembler says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = cuobjdump("-res-usage", "-sass", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    spilled = sum(name.startswith(("LDL", "STL")) for name in names)
    loads = [name.split(".")[1:] for name in names if name.startswith("LDG")]
    widths = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    bits = {next((widths[part] for part in load if part in widths), 32) for load in loads}
    stack = max(numbers["STACK"], numbers["LOCAL"], 4 * spilled)
    return numbers["REG"], stack, len(names), tuple(sorted(bits))


def cuobjdump(*arguments: str) -> str:
    """The one that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def read_amdgcn(kernel: Any) -> tuple[int, int, int, tuple[int, ...]]:
    """The same of AMD's assembly; registers are vector registers, and a spilled scalar register counts as stack."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found.group(1))

    names = re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE)
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}
    loads = [re.fullmatch(r"(?:global|buffer|flat)_load_([a-z0-9]+)\w*", name) for name in names]
    bits = {widths.get(load.group(1), 8) for load in loads if load is not None}
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    stack = max(number("private_segment_fixed_size"), spills)
    return number("vgpr_count"), stack, len(names), tuple(sorted(bits))
