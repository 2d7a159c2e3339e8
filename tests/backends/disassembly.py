"""Reads many cubins with one start of NVIDIA's disassembler, which takes 0.4 s to start and 0.1 s for a kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

from eopd_kernels.testing.control_flow import Instruction
from eopd_kernels.testing.machine_code import NVIDIA_INSTRUCTION, Code, instruction, nvidia_code

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The newest that Triton has, which knows what the others do.
ASSEMBLER = max(tool.name for tool in TOOLS.glob("ptxas*"))
# What nvdisasm calls the targets that Triton compiles for.
ARCHITECTURES = {80: "SM80", 90: "SM90a", 100: "SM100a", 120: "SM120a"}


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin's one function: an ELF file's section ``.text.NAME``."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[of_names][4]
    found = [
        cubin[begin : begin + length]
        for name, _, _, _, begin, length in sections
        if cubin.startswith(b".text.", names + name)
    ]
    assert len(found) == 1, len(found)
    return found[0]


def codes(cubins: Sequence[bytes], architecture: int) -> list[Code]:
    """What ``machine_code.of_cubin`` says of each."""
    ends = []
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        for cubin in cubins:
            file.write(code_of(cubin))
            ends.append(file.tell())
        file.flush()
        text = printed("nvdisasm", "--binary", ARCHITECTURES[architecture], file.name)
    found: list[list[Instruction]] = [[] for _ in cubins]
    i = 0
    for one in map(instruction, NVIDIA_INSTRUCTION.finditer(text)):
        while one.address >= ends[i]:
            i += 1
        found[i].append(one)
    return [nvidia_code(*usage(cubin), instructions) for cubin, instructions in zip(cubins, found, strict=True)]


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack, which take no disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        match = re.search(
            r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed("cuobjdump", "-res-usage", file.name)
        )
    assert match is not None
    registers, stack, local = map(int, match.groups())
    return registers, max(stack, local)


def assembled(text: str, architecture: int, registers: int) -> bytes:
    """PTX as a cubin whose threads have this many registers at most: with few they spill."""
    name = ARCHITECTURES[architecture].replace("SM", "sm_")
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        unbound = re.sub(r"^\.maxnreg .*\n", "", text, flags=re.MULTILINE)
        file.write_text(re.sub(r"^\.reqntid .*", f".maxnreg {registers}", unbound, flags=re.MULTILINE))
        printed(ASSEMBLER, f"--gpu-name={name}", str(file), "-o", str(cubin))
        return cubin.read_bytes()


def printed(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
