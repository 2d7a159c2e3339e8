"""``python -m benchmarks.static``: what the kernels take of each GPU, read from their machine code.

Needs no GPU. Compiles Triton's for a covering choice of dtypes and options; ``--all`` every pair of dtypes, and every
option with a dtype of each size. The CUDA kernels are read from the built extension. Ends with status 1 where a kernel
spills, wants more shared memory or registers than there are, loads 16-bit logits singly or waits within a loop.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from eopd_kernels.backends.cuda.plan import KEPT
from eopd_kernels.testing import machine_code
from eopd_kernels.testing.absent_gpu import DEVICES
from eopd_kernels.testing.kernel_resources import CHOICE, Resources, every_call, every_kernel
from eopd_kernels.testing.machine_code import Kernel

from .measure import progress
from .page import markdown_table, replace_block


def triton_table(found: Iterable[Resources]) -> str:
    """Formats a line per kernel and variant: registers on each device, and the range of the rest over all devices."""
    lines: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in found:
        lines.setdefault((row.kernel, row.problem), {})[row.device] = row
    devices = [device for device in DEVICES if any(device in line for line in lines.values())]
    rows = []
    for (kernel, problem), line in lines.items():
        registers = [str(line[device].registers) if device in line else "–" for device in devices]
        on_all = line.values()
        figures = (
            spread(row.stack for row in on_all),
            spread(row.shared for row in on_all),
            spread(max(row.load_bits) for row in on_all),
            spread(row.instructions for row in on_all),
        )
        rows.append([f"`{kernel}`", problem, *registers, *figures])
    header = ("kernel", "logits → gradient", *devices, "stack", "shared memory", "loads", "instructions")
    return markdown_table(header, rows)


def cuda_table(found: Iterable[Kernel]) -> str:
    """Formats a line per instantiation: registers on each architecture, and the range of the rest over all of them."""
    lines: dict[tuple[str, str, int], dict[str, Kernel]] = {}
    for one in found:
        lines.setdefault((one.name, one.logits, one.kept), {})[one.architecture] = one
    architectures = sorted({a for line in lines.values() for a in line}, key=lambda a: int(re.sub(r"\D", "", a)))
    rows = []
    for (name, logits, kept), line in sorted(lines.items()):
        registers = [str(line[a].registers) if a in line and line[a].exists else "–" for a in architectures]
        there = [one for one in line.values() if one.exists]
        figures = (
            str(there[0].most_registers),
            spread(one.stack for one in there),
            spread(one.wide_loads for one in there),
            spread(one.wide_stores for one in there),
            spread(one.distributed_stores for one in there if one.has_clusters),
            spread(one.instructions for one in there),
        )
        rows.append([f"`{name}`", logits, KEPT[kept], *registers, *figures])
    columns = ("most registers", "stack", "16-byte loads", "16-byte stores", "distributed stores", "instructions")
    return markdown_table(("kernel", "logits", "kept", *architectures, *columns), rows)


def spread(values: Iterable[int]) -> str:
    """Formats one number, or the least and the most of several; a dash for none."""
    ordered = sorted(values)
    if not ordered:
        return "–"
    return f"{ordered[-1]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,}–{ordered[-1]:,}"


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
        calls = list(every_call()) if arguments.all else CHOICE
        unique = every_kernel(calls, arguments.device or list(DEVICES), progress)
        tables.append(f"Triton {triton.__version__}\n\n{triton_table(unique)}")
        unsound += [f"{row}" for row in unique if not row.sound]
    if arguments.only != "triton":
        missing = machine_code.why_not()
        kernels = [] if missing else machine_code.kernels()
        tables.append(f"No CUDA kernels: {missing}." if missing else f"CUDA C++\n\n{cuda_table(kernels)}")
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
