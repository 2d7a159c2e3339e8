"""Builds the native extensions: a small build.ninja each, so that the build is parallel and incremental.

EOPD_BUILD_CPU, EOPD_BUILD_CUDA = auto (default): what cannot be built is left out, and the package installs without it.
                                  1: a failure is an error, and so is a warning.    0: it is not built.
TORCH_CUDA_ARCH_LIST            = the GPUs to compile for, default 8.0;9.0;10.0;12.0+PTX. No GPU and no CUDA build of
                                  torch is asked for.
What happened is recorded in eopd_kernels/_build.json, where the package looks for the reason why a backend is missing.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CFLAGS = "-std=c++17 -O3 -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra".split()
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS: dict[str, list[str]] = {"portable": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": avx2 + avx512}
    BFLOAT16 = [*avx2, *avx512, "-mavx512bf16"]

NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra".split()
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


class BuildError(Exception):
    """Why a backend cannot be built, in one sentence."""


class Recipe(NamedTuple):
    """One extension: objects as (name, source, flags), and what is remembered of its build."""

    compiler: list[str]
    flags: list[str]
    link: list[str]
    objects: list[tuple[str, str, list[str]]]
    facts: dict[str, Any]


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for candidate in map(shlex.split, candidates):
        if candidate and shutil.which(candidate[0]):
            return candidate
    raise BuildError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def has_openmp(compiler: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> str:
    """In CUDA_HOME, on the PATH, or from the pip package nvidia-cuda-nvcc."""
    if "CUDA_HOME" in os.environ:
        candidates = [str(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))]
    else:
        spec = importlib.util.find_spec("nvidia")
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
        candidates = ["nvcc", *(str(path) for folder in folders for path in sorted(folder.glob("*/bin/nvcc")))]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise BuildError(f"no nvcc found (looked for {', '.join(candidates)})")


def gencode(architectures: str) -> list[str]:
    """nvcc's words for a list like "8.0;9.0;12.0+PTX"."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip("; ")):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST may hold architectures like {ARCHITECTURES}, got {name!r}")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def cpu_recipe(strict: bool) -> Recipe:
    """The CPU kernels, an object per instruction set."""
    compiler = find_compiler()
    openmp = has_openmp(compiler)
    flags = [*CFLAGS, *(["-Werror"] if strict else []), *(["-fopenmp"] if openmp else [])]
    flags += ["-DEOPD_X86_KERNELS"] if X86 else []
    link = ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared", "-Wl,-s"]
    objects: list[tuple[str, str, list[str]]] = [("bindings", "bindings.cpp", []), ("dispatch", "cpu/dispatch.cpp", [])]
    objects += [(n, "cpu/kernels.cpp", [*f, f"-DEOPD_INSTRUCTION_SET={n}"]) for n, f in INSTRUCTION_SETS.items()]
    objects += [("products", "cpu/products.cpp", BFLOAT16)] if X86 else []
    facts = {"compiler": shlex.join(compiler), "openmp": openmp, "instruction_sets": list(INSTRUCTION_SETS)}
    return Recipe(compiler, flags, link, objects, facts)


def cuda_recipe(strict: bool) -> Recipe:
    """The CUDA kernels. CUDA's runtime is linked in, so that no library is looked for."""
    nvcc, host = find_nvcc(), find_compiler()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    flags = [*NVCC_FLAGS, *gencode(architectures), *(["-Werror=all-warnings", "-Xcompiler=-Werror"] if strict else [])]
    sources = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cpp", ".cu"))
    objects: list[tuple[str, str, list[str]]] = [(path.stem, f"cuda/{path.name}", []) for path in sources]
    link = ["-shared", "-cudart=static", "-Xlinker=-s"]
    facts = {"compiler": nvcc, "architectures": architectures}
    return Recipe([nvcc, "-ccbin", host[-1]], flags, link, objects, facts)


def ninja_file(recipe: Recipe, flags: list[str], target: Path, folder: Path) -> str:
    """What ninja reads in ``folder``. Paths are seen from there, so that a copy of the project has its build."""
    lines = [
        f"cxx = {shlex.join(recipe.compiler)}",
        f"flags = {shlex.join([*recipe.flags, *flags])}",
        "rule compile",
        "  command = $cxx $flags $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $flags $more $in -o $out",
    ]

    def seen(path: Path) -> str:
        return re.sub("[$ :]", r"$\g<0>", os.path.relpath(path, folder))

    for name, source, more in recipe.objects:
        lines += [f"build {name}.o: compile {seen(ROOT / 'csrc' / source)}", f"  more = {shlex.join(more)}"]
    objects = " ".join(f"{name}.o" for name, _, _ in recipe.objects)
    lines += [f"build {seen(target)}: link {objects}", f"  more = {shlex.join(recipe.link)}"]
    return "\n".join(lines) + "\n"


PARTS = {
    "cpu": ("eopd_kernels._native", cpu_recipe, "the native CPU kernels"),
    "cuda": ("eopd_kernels._cuda", cuda_recipe, "the CUDA kernels"),
}


class NinjaBuild(build_ext):
    outputs: tuple[str, ...] = ()

    def run(self) -> None:
        record = Path(self.get_ext_fullpath("eopd_kernels._native")).resolve().with_name("_build.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({part: self.build_part(part) for part in PARTS}, indent=2) + "\n")
        targets = [Path(self.get_ext_fullpath(module)).resolve() for module, _, _ in PARTS.values()]
        self.outputs = tuple(str(path) for path in (*targets, record) if path.exists())

    def build_part(self, part: str) -> dict[str, object]:
        module, recipe, name = PARTS[part]
        target = Path(self.get_ext_fullpath(module)).resolve()
        switch = f"EOPD_BUILD_{part.upper()}"
        wanted = os.environ.get(switch, "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"{switch} is {wanted!r}; allowed are 0, 1 and auto")
        try:
            if wanted == "0":
                raise BuildError(f"left out by {switch}=0")
            return {"built": True, **self.compile(recipe(wanted == "1"), target, Path(self.build_temp, part))}
        except BuildError as reason:
            if wanted == "1":
                raise SystemExit(f"{switch}=1: {reason}") from None
            target.unlink(missing_ok=True)
            print(f"{name} are not built: {reason}")
            return {"built": False, "reason": str(reason)}

    def compile(self, recipe: Recipe, target: Path, folder: Path) -> dict[str, object]:
        import ninja
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        flags = [part for include in includes for part in ("-isystem", include)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(recipe, flags, target, folder.resolve()))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode != 0:
            errors = [line for line in done.stdout.splitlines() if re.search(r"error\b", line)] or ["ninja failed"]
            raise BuildError(f"{shlex.join(recipe.compiler)} could not compile them: {errors[0]}")
        return recipe.facts

    def get_outputs(self) -> list[str]:
        return list(self.outputs)

    def get_output_mapping(self) -> dict[str, str]:
        return {}


EXTENSIONS = [Extension(module, sources=[]) for module, _, _ in PARTS.values()]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": NinjaBuild})
