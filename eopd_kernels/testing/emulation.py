"""Compiles csrc/cuda for a CPU, where csrc/emulation runs the threads as fibres, and counts the bytes they move.

``EOPD_CUDA_EMULATION`` names the module's file, and the CUDA backend then takes CPU tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from ..backends import cuda
from ..backends.cuda.plan import Plan, Row, resident, streaming
from ..rows import FUNCTIONS
from .data_sheets import DEVICES

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "EOPD_CUDA_EMULATION"
# The kernels' own pragmas are nvcc's, and setjmp does not go with the checks of a hardened longjmp.
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-DEOPD_EMULATION"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),
)
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class NoCompiler(Exception):
    """Why nothing can be emulated, in one sentence."""


def switch_on(flags: Sequence[str] = ()) -> str | None:
    """Builds the emulated kernels and lets the backend load them, unless the environment names them already.

    Returns the reason where that fails.
    """
    if VARIABLE in os.environ:
        return None
    try:
        os.environ[VARIABLE] = str(build(flags=flags))
    except NoCompiler as reason:
        return str(reason)
    return None


def build(
    sources: Path = ROOT / "csrc", folder: Path = ROOT / "build" / "emulation", flags: Sequence[str] = ()
) -> Path:
    """Compiles the module, unless ``folder`` has one of the same sources and flags, and returns its file."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NoCompiler(f"no C++ compiler to emulate CUDA with (looked for {compiler})")
    try:
        import pybind11
    except ImportError:
        raise NoCompiler("pybind11 is not installed, which emulating CUDA needs") from None
    includes = [part for path in (pybind11.get_include(), sysconfig.get_path("include")) for part in ("-isystem", path)]
    command = [compiler, *FLAGS, *flags, *includes]
    target = folder / digest(sources, tuple(command)) / "_cuda.so"
    if not target.exists():
        compile_all(sources, target, command)
    return target


def compile_all(sources: Path, target: Path, command: Sequence[str]) -> None:
    folder = target.with_name(f"building-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    cuda = sources / "cuda"
    launchers = sorted(cuda.glob("launchers_*.cu"))
    units = [*launchers, cuda / "dispatch.cpp", cuda / "bindings.cpp"]
    objects = [str(folder / f"{unit.stem}.o") for unit in units]

    def run(arguments: Sequence[str]) -> None:
        subprocess.run([*command, *arguments], check=True)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, [["-x", "c++", "-c", str(u), "-o", o] for u, o in zip(units, objects, strict=True)]))
    run(["-shared", *objects, "-o", str(folder / target.name)])
    os.replace(folder / target.name, target)  # whole or not at all, should two processes build
    shutil.rmtree(folder)


def digest(sources: Path, command: tuple[str, ...]) -> str:
    """Hashes the command and all sources, those of the CPU kernels too, whose headers the emulation includes."""
    files = sorted(path for path in sources.rglob("*.*") if path.is_file() and path.name != "kernels.cpp")
    state = hashlib.sha256(repr(command).encode())
    for path in files:
        state.update(f"{path.relative_to(sources)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def variant(folder: Path, file: str, changed: str, flags: Sequence[str] = ()) -> Path:
    """Compiles the kernels with ``changed`` as the text of ``file`` of csrc/cuda, for float32 logits only."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    for path in (sources / "cuda").glob("launchers_*.cu"):
        if path.stem != "launchers_32_32":
            path.write_text(
                f'#include "launchers.h"\n'
                f"namespace eopd::cuda {{ extern const Launchers {path.stem}; const Launchers {path.stem}{{}}; }}\n"
            )
    (sources / "cuda" / file).write_text(changed)
    return build(sources, flags=flags)


def loaded(module: Path) -> ModuleType:
    """Loads a module beside the backend's own, under a name of its own because pybind11 keeps one module per name."""
    spec = importlib.util.spec_from_file_location(f"{module.parent.name}._cuda", module)
    assert spec is not None and spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


@dataclass(frozen=True)
class Traffic:
    """What loss and gradient of a row move: bytes loaded and stored per pair of logits, and the loads of one logit."""

    plan: Plan
    loads: float
    stores: float
    scalar_loads: int


def count_traffic(
    vocab_size: int, student: torch.dtype, out: torch.dtype, device: str, keeps: bool = True, rows: int = 2
) -> Traffic:
    """Counts the bytes of ``row_loss_and_gradient`` under the plan for ``device``; ``keeps=False``: for two visits."""
    row = Row(vocab_size, student.itemsize, student.itemsize)
    kept = resident(row, DEVICES[device]) if keeps else None
    plan = kept or streaming(rows * DEVICES[device].multiprocessors, vocab_size, DEVICES[device])
    blocks = [torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(i)).to(student) for i in range(2)]
    transforms, combine = [1.0, 0.0, 1.0] * 2, [1.0, 0.0, 0.0, 1.0]
    kernels = cuda.kernels()
    kernels.reset_counters()
    with mock.patch.object(cuda, "resident_or_streaming", lambda *blocks: plan):
        gradient = torch.empty(rows, vocab_size, dtype=out)
        FUNCTIONS["cuda"].row_loss_and_gradient(
            blocks[0], blocks[1], torch.ones(rows), 0.8, combine, transforms, gradient
        )
    counted = kernels.counters()
    pairs = rows * vocab_size
    return Traffic(plan, counted["logit_bytes"] / pairs, counted["gradient_bytes"] / pairs, counted["scalar_loads"])
