"""Compiles csrc/cuda for a CPU: the same kernels on csrc/emulation's fibres, as a module that the backend can load.

``EOPD_CUDA_EMULATION`` names the module's file, and the CUDA backend then takes CPU tensors. For tests and counts only:
setup.py neither builds it nor ships it.
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
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulation"
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
    """Lets the backend load the emulated kernels, unless the environment names them; the reason where that fails."""
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
    """The module's file; compiled where these sources and flags have not been compiled into ``folder`` before."""
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
    """Names what would be compiled. The emulation borrows headers of the CPU kernels."""
    files = sorted(path for path in sources.rglob("*.*") if path.is_file() and path.name != "kernels.cpp")
    state = hashlib.sha256(repr(command).encode())
    for path in files:
        state.update(f"{path.relative_to(sources)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def variant(folder: Path, file: str, changed: str, flags: Sequence[str] = ()) -> Path:
    """A module of sources in which ``file`` of csrc/cuda has become ``changed``, for float32 logits alone."""
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
    """A module beside the one that the backend uses; pybind11 hands out one of each full name."""
    spec = importlib.util.spec_from_file_location(f"{module.parent.name}._cuda", module)
    assert spec is not None and spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result
