"""Compiles the Triton backend's calls for absent GPUs, and reads what each kernel takes of its GPU.

Not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

from . import machine_code
from .absent_gpu import DEVICES, DTYPES, LAYOUTS, SPLIT_ROWS, WHOLE_ROWS, Variant, call, compiling_for

Call = tuple[str, Variant, int]  # a row function, the options of its kernels, and the number of rows
BOTH = (True, True)
# The widest and the narrowest dtypes with every gradient they can have, and what costs most registers on top.
CHOICE: list[Call] = [
    ("row_loss_and_gradient", Variant("fp32", "fp32", "fp32"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("bf16", "bf16", "bf16"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("fp16", "fp16", "fp16", BOTH), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("fp32", "fp32", "bf16"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("fp64", "fp64", "fp64"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("bf16", "bf16", "bf16", layout="odd"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("fp64", "bf16", "fp64", layout="odd"), WHOLE_ROWS),
    ("row_loss_and_gradient", Variant("bf16", "bf16", "fp32"), SPLIT_ROWS),
    ("row_mixture", Variant("bf16", "bf16", "fp32"), WHOLE_ROWS),
    ("row_mixture_gradient", Variant("bf16", "bf16", "fp32"), WHOLE_ROWS),
]


def every_call() -> Iterator[Call]:
    """Yields each pair of dtypes with each dtype of the gradient, each softcap and layout with a dtype of each size."""
    variants = []
    for student, teacher in product(DTYPES, DTYPES):
        compute = "fp64" if "fp64" in (student, teacher) else "fp32"
        # Blocks of hidden states' logits are fp32, and their gradient has the head's dtype.
        heads = {"bf16", "fp16"} if student == teacher == "fp32" else set()
        variants += [Variant(student, teacher, out) for out in sorted({student, compute} | heads)]
    for dtype in ("fp32", "bf16", "fp64"):
        variants += [Variant(dtype, dtype, dtype, (student, not student)) for student in (True, False)]
        variants += [Variant(dtype, dtype, dtype, BOTH, layout) for layout in LAYOUTS]
    statistics: set[Variant] = set()
    for variant in variants:
        for function in ("row_gradient", "row_loss_and_gradient"):
            yield function, variant, WHOLE_ROWS
        yield "row_loss_and_gradient", variant, SPLIT_ROWS
        same = replace(variant, out="fp32")  # no gradient there
        if same not in statistics:
            statistics.add(same)
            yield "row_statistics", variant, WHOLE_ROWS
            yield "row_statistics", variant, SPLIT_ROWS
    # Skewed divergences load and store as the kernels above do: pairs of two dtypes have been seen there. A half that
    # is not skewed is a variant with less to compute.
    alike = [variant for variant in variants if variant.student == variant.teacher]
    alike += [
        Variant(dtype, dtype, dtype, BOTH, skewed=skewed)
        for dtype, skewed in product(("fp32", "bf16", "fp64"), ((True, False), (False, True)))
    ]
    for variant in alike:
        for function in ("row_mixture", "row_mixture_gradient"):
            yield function, variant, WHOLE_ROWS


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its GPU.

    Args:
        kernel, device, problem: which kernel, compiled for what.
        registers: of a thread.
        stack, shared, shared_limit: bytes of a thread's stack (spills), and of a program's shared memory.
        instructions: how many there are.
        load_bits: the widths of its global loads, ascending.
        narrow_loads: whether a 16-bit logit is loaded by itself where it need not be.
        exchanges_in_loops: what threads wait for each other in, in the loops over columns: nothing.
    """

    kernel: str
    device: str
    problem: str
    registers: int
    stack: int
    shared: int
    shared_limit: int
    instructions: int
    load_bits: tuple[int, ...]
    narrow_loads: bool
    exchanges_in_loops: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return (
            self.stack == 0
            and self.shared <= self.shared_limit
            and not self.narrow_loads
            and not self.exchanges_in_loops
        )


READ: dict[str, machine_code.Code] = {}  # by hash, because several calls launch the same kernel


def resources(function: str, variant: Variant, rows: int, device: str) -> list[Resources]:
    """Compiles one call for one device, and returns the resources of each kernel that it launches."""
    with compiling_for(DEVICES[device]) as compiled:
        call(function, variant, rows)
    result = []
    for kernel in compiled:
        if kernel.hash not in READ:
            amd = "amdgcn" in kernel.asm
            READ[kernel.hash] = (
                machine_code.of_amdgcn(kernel.asm["amdgcn"]) if amd else machine_code.of_cubin(kernel.asm["cubin"])
            )
        code = READ[kernel.hash]
        result.append(
            Resources(
                kernel.metadata.name.removesuffix("_kernel"),
                device,
                str(variant),
                code.registers,
                code.stack,
                kernel.metadata.shared,
                DEVICES[device].shared_limit,
                len(code.instructions),
                code.load_bits,
                variant.loads_16_bits and min(code.load_bits, default=32) < 32,
                code.exchanges_in_loops,
            )
        )
    return result


def compiled(task: tuple[Call, str]) -> list[Resources]:
    """Compiles one call for one device, for a process of its own."""
    (function, variant, rows), device = task
    return resources(function, variant, rows, device)


def every_kernel(
    calls: Sequence[Call], devices: Sequence[str], progress: Callable[[str], None]
) -> dict[Resources, None]:
    """Compiles every call for every device, in two processes, and returns each kernel once, in order."""
    tasks = [(one, device) for device in devices for one in calls]
    unique: dict[Resources, None] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(compiled, tasks), 1):
            unique.update(dict.fromkeys(found))
            progress(f"{done} of {len(tasks)}")
    return unique
