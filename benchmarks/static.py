"""``python -m benchmarks.static``: what the kernels take of each GPU, read from their machine code.

Needs no GPU. Compiles Triton's for a covering choice of dtypes and options; ``--all`` every pair of dtypes, and every
option with a dtype of each size. The CUDA kernels are read from the built extension. Ends with status 1 where a kernel
spills, wants more shared memory or registers than there are, or loads 16-bit logits one by one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import triton

from .cuda import machine_code
from .measure import progress
from .offline import DEVICES, DTYPES, LAYOUTS, SPLIT_ROWS, WHOLE_ROWS, Problem, Resources, resources
from .page import replace_block
from .results import markdown_table

Task = tuple[str, Problem, int, str]
BOTH = (True, True)
# The widest and the narrowest dtypes with every gradient they can have, and what costs most registers on top.
CHOICE = [
    ("row_loss_and_gradient", Problem("fp32", "fp32", "fp32"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("bf16", "bf16", "bf16"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("fp16", "fp16", "fp16", BOTH), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("fp32", "fp32", "bf16"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("fp64", "fp64", "fp64"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("bf16", "bf16", "bf16", layout="odd"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("fp64", "bf16", "fp64", layout="odd"), WHOLE_ROWS),
    ("row_loss_and_gradient", Problem("bf16", "bf16", "fp32"), SPLIT_ROWS),
    ("row_mixture", Problem("bf16", "bf16", "fp32"), WHOLE_ROWS),
    ("row_mixture_gradient", Problem("bf16", "bf16", "fp32"), WHOLE_ROWS),
]


def every_call() -> Iterable[tuple[str, Problem, int]]:
    """Each pair of dtypes with each dtype of the gradient; each softcap and layout with one dtype of each size."""
    problems = []
    for student, teacher in product(DTYPES, DTYPES):
        compute = "fp64" if "fp64" in (student, teacher) else "fp32"
        # Blocks of hidden states' logits are fp32, and their gradient has the head's dtype.
        heads = {"bf16", "fp16"} if student == teacher == "fp32" else set()
        problems += [Problem(student, teacher, out) for out in sorted({student, compute} | heads)]
    for dtype in ("fp32", "bf16", "fp64"):
        problems += [Problem(dtype, dtype, dtype, (student, not student)) for student in (True, False)]
        problems += [Problem(dtype, dtype, dtype, BOTH, layout) for layout in LAYOUTS]
    statistics: set[Problem] = set()
    for problem in problems:
        for function in ("row_gradient", "row_loss_and_gradient"):
            yield function, problem, WHOLE_ROWS
        yield "row_loss_and_gradient", problem, SPLIT_ROWS
        same = replace(problem, out="fp32")  # no gradient there
        if same not in statistics:
            statistics.add(same)
            yield "row_statistics", problem, WHOLE_ROWS
            yield "row_statistics", problem, SPLIT_ROWS
    # Skewed divergences load and store as the kernels above do: pairs of two dtypes have been seen there. A half that
    # is not skewed is a variant with less to compute.
    alike = [problem for problem in problems if problem.student == problem.teacher]
    alike += [
        Problem(dtype, dtype, dtype, BOTH, skewed=skewed)
        for dtype, skewed in product(("fp32", "bf16", "fp64"), ((True, False), (False, True)))
    ]
    for problem in alike:
        for function in ("row_mixture", "row_mixture_gradient"):
            yield function, problem, WHOLE_ROWS


def measured(task: Task) -> list[Resources]:
    return resources(*task)


def table(found: Iterable[Resources]) -> str:
    """A line per kernel and problem: registers on each device, and what is the same on all of them or the most."""
    lines: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in found:
        lines.setdefault((row.kernel, row.problem), {})[row.device] = row
    devices = [device for device in DEVICES if any(device in line for line in lines.values())]
    header = ("kernel", "logits → gradient", *devices, "stack", "shared memory", "loads", "instructions")
    return markdown_table(
        header,
        [
            [
                f"`{kernel}`",
                problem,
                *(str(line[device].registers) if device in line else "–" for device in devices),
                spread([row.stack for row in line.values()]),
                spread([row.shared for row in line.values()]),
                spread([max(row.load_bits) for row in line.values()]),
                spread([row.instructions for row in line.values()]),
            ]
            for (kernel, problem), line in lines.items()
        ],
    )


def spread(values: Sequence[int]) -> str:
    """One number, or the least and the most."""
    least, most = min(values), max(values)
    return f"{most:,}" if least == most else f"{least:,}–{most:,}"


def triton_kernels(everything: bool, devices: Sequence[str]) -> dict[Resources, None]:
    """Each kernel of each call once, in order."""
    calls = list(every_call()) if everything else CHOICE
    tasks = [(*call, device) for device in devices for call in calls]
    unique: dict[Resources, None] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(measured, tasks), 1):
            unique.update(dict.fromkeys(found))
            progress(f"{done} of {len(tasks)}")
    return unique


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every pair of dtypes and every option, five minutes")
    parser.add_argument("--device", action="append", choices=list(DEVICES), help="instead of all of them")
    parser.add_argument("--only", choices=["triton", "cuda"], help="instead of both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated block of this page")
    arguments = parser.parse_args()
    unique: dict[Resources, None] = {}
    tables, unsound = [], []
    if arguments.only != "cuda":
        unique = triton_kernels(arguments.all, arguments.device or list(DEVICES))
        tables.append(f"Triton {triton.__version__}\n\n{table(unique)}")
        unsound += [f"{row}" for row in unique if not row.sound]
    if arguments.only != "triton":
        missing = machine_code.why_not()
        kernels = [] if missing else machine_code.kernels()
        tables.append(f"No CUDA kernels: {missing}." if missing else f"CUDA C++\n\n{machine_code.table(kernels)}")
        unsound += [f"{kernel}: {', '.join(kernel.problems)}" for kernel in kernels if kernel.problems]
    text = "\n\n".join(tables)
    print(text)
    if arguments.write:
        replace_block(arguments.write, "static", text)
    if arguments.json:
        arguments.json.write_text(json.dumps([{**asdict(row), "sound": row.sound} for row in unique], indent=1))
    for line in unsound:
        print(f"unsound: {line}")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
