"""Reads many cubins with one start of NVIDIA's disassembler, which takes 0.4 s to start and 0.1 s for a kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from eopd_kernels.testing.control_flow import Instruction
from eopd_kernels.testing.machine_code import NVIDIA_INSTRUCTION, Code, instruction, nvidia_code

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The newest that Triton has, which knows what the others do.
ASSEMBLER = max(tool.name for tool in TOOLS.glob("ptxas*"))
# What nvdisasm calls the targets that Triton compiles for.
ARCHITECTURES = {80: "SM80", 90: "SM90a", 100: "SM100a", 120: "SM120a"}
# Of ELF: a section that takes no bytes of the file. Of .nv.info: an entry with a size, and what it is of.
NO_BITS, SIZED, REGISTERS, STACK = 8, 4, 0x2F, 0x11


def sections(cubin: bytes) -> dict[bytes, bytes]:
    """The sections of an ELF file, by name."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = headers[of_names][4]
    found = {}
    for name, kind, _, _, begin, length in headers:
        text = cubin[names + name : cubin.index(b"\0", names + name)]
        found[text] = b"" if kind == NO_BITS else cubin[begin : begin + length]
    return found


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin's one function."""
    (code,) = [content for name, content in sections(cubin).items() if name.startswith(b".text.")]
    return code


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
    """Registers and bytes of stack, which no disassembler need be asked for: 0.1 s each, of hundreds."""
    of_function = {attribute: value for attribute, _, value in attributes(sections(cubin)[b".nv.info"])}
    return of_function[REGISTERS], of_function[STACK]


def attributes(section: bytes) -> Iterator[tuple[int, int, int]]:
    """The numbers that ``.nv.info`` has of functions: attribute, symbol, value."""
    at = 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == SIZED:
            if size == 8:
                yield attribute, *struct.unpack_from("<II", section, at)
            at += size


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
