"""Reads the machine code of compiled kernels: registers, stack and spills, instructions and the widths of their loads.

NVIDIA's code needs the disassembler that comes with Triton, or one on the PATH. Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backends.cuda.plan import NOTHING, THREADS
from .control_flow import Instruction, successors

PACKAGE = Path(__file__).resolve().parents[1]
WIDTHS = {"Bits32": "32", "Bits16": "16", "AnyBits": "any"}
# A symbol belongs to the first of these names that it contains.
KERNELS = ("row_loss_and_gradient", "row_statistics", "row_gradient", "row_mixture_gradient", "row_mixture")
REGISTERS = 65_536
# CTAs that share a multiprocessor: two, and one where float64 is possible.
CTAS, CTAS_OF_ANY = 2, 1
# Registers come in steps of 8, and a multiprocessor's are in four parts that a warp does not straddle.
STEP, PARTS, WARP = 8, 4, 32
# The bits that a load moves, by the parts of its name; 32 where none of them occurs.
NVIDIA_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
# An instruction's address, predicate, name and operands; AMD's assembly has labels instead of addresses.
NVIDIA_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*)", re.MULTILINE)
AMD_INSTRUCTION = re.compile(r"^(?:\t([a-z]+_\w+)(.*)|(\.LBB\w+):)", re.MULTILINE)
# What threads wait for each other in: shuffles, votes, barriers, shared memory.
EXCHANGES = re.compile(r"SHFL|REDUX|VOTE|BAR|LDS|STS|ATOMS|ds_|s_barrier|v_readlane|v_permlane|\w+_dpp$")
LOADS = ("LDG", "global_load", "buffer_load")
AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class Code:
    """The machine code of one function.

    Args:
        registers: of a thread; vector registers on an AMD GPU.
        stack: bytes of stack, local memory or spills of a thread, whichever is most.
        instructions: their names, in order.
        load_bits: the widths of its loads from global memory, ascending.
        exchanges_in_loops: what threads wait for each other in, within loops that load from global memory.
    """

    registers: int
    stack: int
    instructions: tuple[str, ...]
    load_bits: tuple[int, ...]
    exchanges_in_loops: tuple[str, ...]


def exchanges_in_loops(instructions: Sequence[Instruction]) -> tuple[str, ...]:
    """Names what threads wait for each other in, within the loops that load from global memory.

    A loop is what lies on a way from the target of a branch back to the branch, wherever compilers have put it.
    """
    index = {one.address: i for i, one in enumerate(instructions)}
    after = successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    found: set[str] = set()
    for i, one in enumerate(instructions):
        if one.target is not None and one.target <= one.address:
            loop = {instructions[j].name for j in reached(index[one.target], after) & reached(i, before)}
            if any(name.startswith(LOADS) for name in loop):
                found |= set(filter(EXCHANGES.match, loop))
    return tuple(sorted(found))


def reached(start: int, edges: Sequence[Sequence[int]]) -> set[int]:
    """All nodes of a graph that edges lead to from one of them, which is among them."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += edges[node]
    return seen


def of_cubin(cubin: bytes) -> Code:
    """Reads the only function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = disassembled(Path(file.name)).values()
    return code


def disassembled(file: Path) -> dict[tuple[str, str], Code]:
    """Reads every function of a cubin or an extension with cuobjdump, by (architecture, symbol)."""
    tool = disassembler()
    assert tool is not None
    architecture = symbol = ""
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    found: dict[tuple[str, str], list[Instruction]] = {}
    with subprocess.Popen([tool, "-res-usage", "-sass", str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"arch = (\w+)", line):
                architecture = match[1]
            elif match := re.match(r"\s*Function (?:: )?(\w+)", line):
                symbol = match[1]
            elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
                registers, stack, local = map(int, match.groups())
                usage[architecture, symbol] = registers, max(stack, local)
            elif match := NVIDIA_INSTRUCTION.match(line):
                found.setdefault((architecture, symbol), []).append(instruction(match))
    return {key: nvidia_code(*figures, found.get(key, [])) for key, figures in usage.items()}


def instruction(match: re.Match[str]) -> Instruction:
    """One line of NVIDIA's disassembly."""
    address, predicate, name, operands = match.groups()
    target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
    ends = name.startswith(("BRA", "EXIT", "RET")) and not predicate and not re.search(r"\bU?P\d|UR\d", operands)
    return Instruction(int(address, 16), name, int(target[1], 16) if target else None, not ends)


def nvidia_code(registers: int, stack: int, instructions: Sequence[Instruction]) -> Code:
    names = [one.name for one in instructions]
    spills = sum(name.startswith(("LDL", "STL")) for name in names)
    loads = [name.split(".")[1:] for name in names if name.startswith("LDG")]
    bits = {next((NVIDIA_BITS[part] for part in load if part in NVIDIA_BITS), 32) for load in loads}
    in_loops = exchanges_in_loops(instructions)
    return Code(registers, max(stack, 4 * spills), tuple(names), tuple(sorted(bits)), in_loops)


def of_amdgcn(text: str) -> Code:
    """Reads AMD's assembly of one kernel. A spilled scalar register counts as stack."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for name, operands, label in AMD_INSTRUCTION.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((name, operands.strip()))
    names = [name for name, _ in lines]
    instructions = [
        Instruction(i, name, labels.get(operands), name not in ("s_branch", "s_endpgm"))
        for i, (name, operands) in enumerate(lines)
    ]
    loads = [re.fullmatch(r"(?:global|buffer|flat)_load_([a-z0-9]+)\w*", name) for name in names]
    bits = {AMD_BITS.get(load[1], 8) for load in loads if load is not None}
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    stack = max(number("private_segment_fixed_size"), spills)
    in_loops = exchanges_in_loops(instructions)
    return Code(number("vgpr_count"), stack, tuple(names), tuple(sorted(bits)), in_loops)


def sass(file: Path, architecture: str, symbol: str) -> list[Instruction]:
    """Reads the instructions of the first function of an architecture whose symbol matches, in order."""
    tool = disassembler()
    assert tool is not None

    def printed(*asked: str) -> str:
        command = [tool, *asked, "-arch", architecture, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    names = re.findall(r"^ *Function (\w+)", printed("-res-usage"), re.MULTILINE)
    name = next(name for name in names if re.search(symbol, name))
    text = printed("-sass", "-fun", name)  # by its name alone: all of an extension's functions take many seconds
    return [instruction(match) for match in NVIDIA_INSTRUCTION.finditer(text)]


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a CUDA kernel on one architecture; ``student`` and ``teacher`` are the bits of a logit."""

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
    distributed_stores: int
    cluster_barriers: int

    @property
    def logits(self) -> str:
        return "any" if self.student == "any" else f"{self.student} {self.teacher} bits"

    @property
    def exists(self) -> bool:
        """False for the empty kernel that stands where there are no clusters to keep a row in."""
        return self.kept == NOTHING or self.has_clusters

    @property
    def has_clusters(self) -> bool:
        return int(re.sub(r"\D", "", self.architecture)) >= 90

    @property
    def writes(self) -> bool:
        """Whether the kernel writes a gradient."""
        return self.name.endswith("gradient")

    @property
    def merges(self) -> bool:
        """Whether the kernel merges the sums of the CTAs of a cluster."""
        return self.has_clusters and self.name not in ("row_gradient", "row_mixture_gradient")

    @property
    def most_registers(self) -> int:
        """The most registers with which the intended number of CTAs still share a multiprocessor."""
        warps = THREADS[self.kept] // WARP * (CTAS_OF_ANY if self.student == "any" else CTAS)
        return min(255, REGISTERS // PARTS // -(-warps // PARTS) // WARP // STEP * STEP)

    @property
    def problems(self) -> list[str]:
        """What is not as it should be, in words."""
        if not self.exists:
            return []
        in_vectors = self.student != "any"
        found = {
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.registers} registers, at most {self.most_registers}": self.registers > self.most_registers,
            "no loads of 16 bytes": in_vectors and self.wide_loads == 0,
            "no stores of 16 bytes": in_vectors and self.writes and self.wide_stores == 0,
            "no distributed shared memory": self.merges and self.distributed_stores == 0,
            "no cluster barrier": self.merges and self.cluster_barriers == 0,
        }
        return [problem for problem, there in found.items() if there]


def why_not() -> str | None:
    """Returns None if the CUDA extension can be read, else why not."""
    if extension() is None:
        return "the CUDA extension was not built"
    return None if disassembler() is not None else "there is no cuobjdump: neither on the PATH nor in Triton"


def extension() -> Path | None:
    """Finds the file of the built CUDA extension."""
    files = [PACKAGE / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((file for file in files if file.exists()), None)


@functools.cache
def disassembler() -> str | None:
    """Finds cuobjdump, in Triton or on the PATH."""
    spec = importlib.util.find_spec("triton")
    of_triton = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(of_triton) if of_triton is not None and of_triton.exists() else shutil.which("cuobjdump")


def kernels() -> list[Kernel]:
    """Reads every instantiation on every architecture of the built CUDA extension."""
    file = extension()
    assert file is not None
    found = disassembled(file)
    return [kernel(*key, code) for key, code in found.items() if any(name in key[1] for name in KERNELS)]


def kernel(architecture: str, symbol: str, code: Code) -> Kernel:
    widths = [WIDTHS[name] for name in re.findall("|".join(WIDTHS), symbol)]
    kept = re.search(r"KeptE(\d)", symbol)
    names = code.instructions
    return Kernel(
        name=next(name for name in KERNELS if name in symbol),
        student=widths[0],
        teacher=widths[-1],
        kept=int(kept[1]) if kept else NOTHING,
        architecture=architecture,
        registers=code.registers,
        stack=code.stack,
        instructions=len(names),
        wide_loads=sum(name.startswith("LDG") and name.endswith(".128") for name in names),
        wide_stores=sum(name.startswith("STG") and name.endswith(".128") for name in names),
        distributed_stores=sum(name.split(".")[0] == "ST" for name in names),
        cluster_barriers=sum(name.startswith("UCGABAR") for name in names),
    )
