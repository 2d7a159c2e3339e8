"""The CUDA kernels as nvcc has compiled them, read from the built extension: registers, spills, widths, instructions.

Needs the extension and the disassembler that comes with Triton (or one on the PATH), and no GPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eopd_kernels.backends.cuda.plan import KEPT, NOTHING, THREADS

from ..results import markdown_table

PACKAGE = Path(__file__).resolve().parents[2] / "eopd_kernels"
WIDTHS = {"Bits32": "32", "Bits16": "16", "AnyBits": "any"}
# The first one that a symbol contains is its kernel's.
KERNELS = ("row_loss_and_gradient", "row_statistics", "row_gradient", "row_mixture_gradient", "row_mixture")
REGISTERS = 65_536
# Two CTAs to a multiprocessor, and one where float64 may be.
CTAS, CTAS_OF_ANY = 2, 1
# Registers come in steps of 8, and a multiprocessor's are in four parts that a warp does not straddle.
STEP, PARTS, WARP = 8, 4, 32


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture; ``stack`` in bytes."""

    name: str
    student: str
    teacher: str
    kept: int
    architecture: str
    registers: int
    stack: int
    instructions: int
    wide_loads: int
    wide_stores: int
    distributed_loads: int
    cluster_barriers: int

    @property
    def logits(self) -> str:
        return "any" if self.student == "any" else f"{self.student} {self.teacher} bits"

    @property
    def exists(self) -> bool:
        """Not where there are no clusters that could keep a row: the kernel is empty there."""
        return self.kept == NOTHING or self.has_clusters

    @property
    def has_clusters(self) -> bool:
        return int(re.sub(r"\D", "", self.architecture)) >= 90

    @property
    def writes(self) -> bool:
        """A gradient."""
        return self.name.endswith("gradient")

    @property
    def merges(self) -> bool:
        """What the CTAs of a cluster have summed."""
        return self.has_clusters and self.name not in ("row_gradient", "row_mixture_gradient")

    @property
    def most_registers(self) -> int:
        """With which as many CTAs share a multiprocessor as were meant to."""
        warps = THREADS[self.kept] // WARP * (CTAS_OF_ANY if self.student == "any" else CTAS)
        return min(255, REGISTERS // PARTS // -(-warps // PARTS) // WARP // STEP * STEP)

    @property
    def problems(self) -> list[str]:
        """What is not as it should be."""
        if not self.exists:
            return []
        in_vectors = self.student != "any"
        found = {
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.registers} registers, at most {self.most_registers}": self.registers > self.most_registers,
            "no loads of 16 bytes": in_vectors and self.wide_loads == 0,
            "no stores of 16 bytes": in_vectors and self.writes and self.wide_stores == 0,
            "no distributed shared memory": self.merges and self.distributed_loads == 0,
            "no cluster barrier": self.merges and self.cluster_barriers == 0,
        }
        return [problem for problem, there in found.items() if there]


def why_not() -> str | None:
    """None if there is something to read and something to read it with."""
    if built() is None:
        return "the CUDA extension was not built"
    return None if disassembler() is not None else "there is no cuobjdump: neither on the PATH nor in Triton"


def built() -> Path | None:
    files = [PACKAGE / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((file for file in files if file.exists()), None)


def disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    of_triton = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(of_triton) if of_triton is not None and of_triton.exists() else shutil.which("cuobjdump")


def kernels() -> list[Kernel]:
    """Every instantiation on every architecture of the built extension."""
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    for architecture, line, symbol in sections("-res-usage"):
        if match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            registers, stack, local = map(int, match.groups())
            usage[architecture, symbol] = registers, max(stack, local)
    names: dict[tuple[str, str], list[str]] = {}
    for architecture, line, symbol in sections("-sass"):
        if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            names.setdefault((architecture, symbol), []).append(match[1])
    return [kernel(*key, *usage[key], names.get(key, [])) for key in usage if any(name in key[1] for name in KERNELS)]


def sections(option: str) -> Iterator[tuple[str, str, str]]:
    """cuobjdump's lines, each with the architecture and the function that it belongs to."""
    file, tool = built(), disassembler()
    assert file is not None and tool is not None
    architecture = symbol = ""
    with subprocess.Popen([tool, option, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("arch = "):
                architecture = line.split()[2]
            elif match := re.match(r"\s*Function (?:: )?(\w+)", line):
                symbol = match[1]
            else:
                yield architecture, line, symbol


def kernel(architecture: str, symbol: str, registers: int, stack: int, names: list[str]) -> Kernel:
    widths = [WIDTHS[name] for name in re.findall("|".join(WIDTHS), symbol)]
    kept = re.search(r"KeptE(\d)", symbol)
    spills = sum(name.startswith(("LDL", "STL")) for name in names)
    return Kernel(
        next(name for name in KERNELS if name in symbol),
        widths[0],
        widths[-1],
        int(kept[1]) if kept else NOTHING,
        architecture,
        registers,
        max(stack, 4 * spills),
        len(names),
        sum(name.startswith("LDG") and name.endswith(".128") for name in names),
        sum(name.startswith("STG") and name.endswith(".128") for name in names),
        sum(name.split(".")[0] == "LD" for name in names),
        sum(name.startswith("UCGABAR") for name in names),
    )


def table(found: Iterable[Kernel]) -> str:
    """A line per instantiation: registers of those there may be, on each architecture."""
    lines: dict[tuple[str, str, int], dict[str, Kernel]] = {}
    for one in found:
        lines.setdefault((one.name, one.logits, one.kept), {})[one.architecture] = one
    architectures = sorted({a for line in lines.values() for a in line}, key=lambda a: int(re.sub(r"\D", "", a)))
    columns = ("most registers", "stack", "16-byte loads", "16-byte stores", "distributed loads", "instructions")
    rows = []
    for (name, logits, kept), line in sorted(lines.items()):
        there = [one for one in line.values() if one.exists]
        registers = [str(line[a].registers) if a in line and line[a].exists else "–" for a in architectures]
        clusters = [one for one in there if one.has_clusters]
        rows.append(
            [
                f"`{name}`",
                logits,
                KEPT[kept],
                *registers,
                str(there[0].most_registers),
                spread(one.stack for one in there),
                spread(one.wide_loads for one in there),
                spread(one.wide_stores for one in there),
                spread(one.distributed_loads for one in clusters),
                spread(one.instructions for one in there),
            ]
        )
    return markdown_table(("kernel", "logits", "kept", *architectures, *columns), rows)


def spread(values: Iterable[int]) -> str:
    """One number, or the least and the most."""
    ordered = sorted(values)
    if not ordered:
        return "–"
    return f"{ordered[-1]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,}–{ordered[-1]:,}"
