"""Builds the native kernels: a small build.ninja per compiler, so that the build is parallel and incremental.

EOPD_BUILD_CPU = auto (default): without a working C++ compiler the package installs without them.
                 1: a failure is an error, and so is a warning.    0: they are not built.
What happened is recorded in eopd_kernels/_build.json, where the package looks for the reason why a backend is missing.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

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


class BuildError(Exception):
    """Why a backend cannot be built, in one sentence."""


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


def ninja_file(compiler: list[str], flags: list[str], target: Path) -> str:
    """One object per source, the CPU kernels one per instruction set."""
    sources: list[tuple[str, str, list[str]]] = [("bindings", "bindings.cpp", []), ("dispatch", "cpu/dispatch.cpp", [])]
    sources += [(n, "cpu/kernels.cpp", [*f, f"-DEOPD_INSTRUCTION_SET={n}"]) for n, f in INSTRUCTION_SETS.items()]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $flags $more $in -o $out",
    ]
    escape = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
    for name, source, more in sources:
        path = str(ROOT / "csrc" / source).translate(escape)
        lines += [f"build {name}.o: compile {path}", f"  more = {shlex.join(more)}"]
    link = ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared", "-Wl,-s"]
    objects = " ".join(f"{name}.o" for name, _, _ in sources)
    lines += [f"build {str(target).translate(escape)}: link {objects}", f"  more = {shlex.join(link)}"]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    outputs: tuple[str, ...] = ()

    def run(self) -> None:
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        record = target.parent / "_build.json"
        record.write_text(json.dumps({"cpu": self.build_cpu(target)}, indent=2) + "\n")
        self.outputs = tuple(str(path) for path in (target, record) if path.exists())

    def build_cpu(self, target: Path) -> dict[str, object]:
        wanted = os.environ.get("EOPD_BUILD_CPU", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"EOPD_BUILD_CPU is {wanted!r}; allowed are 0, 1 and auto")
        try:
            if wanted == "0":
                raise BuildError("left out by EOPD_BUILD_CPU=0")
            return {"built": True, **self.compile(target, ["-Werror"] if wanted == "1" else [])}
        except BuildError as reason:
            if wanted == "1":
                raise SystemExit(f"EOPD_BUILD_CPU=1: {reason}") from None
            target.unlink(missing_ok=True)
            print(f"the native CPU kernels are not built: {reason}")
            return {"built": False, "reason": str(reason)}

    def compile(self, target: Path, flags: list[str]) -> dict[str, object]:
        import ninja
        import pybind11

        compiler = find_compiler()
        openmp = has_openmp(compiler)
        flags = [*CFLAGS, *flags, *(["-fopenmp"] if openmp else []), *(["-DEOPD_X86_KERNELS"] if X86 else [])]
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        flags += [part for include in includes for part in ("-isystem", include)]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, flags, target))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode != 0:
            errors = [line for line in done.stdout.splitlines() if "error:" in line] or ["ninja failed"]
            raise BuildError(f"{shlex.join(compiler)} could not compile them: {errors[0]}")
        return {"compiler": shlex.join(compiler), "openmp": openmp, "instruction_sets": list(INSTRUCTION_SETS)}

    def get_outputs(self) -> list[str]:
        return list(self.outputs)

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("eopd_kernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
