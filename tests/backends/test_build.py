"""setup.py in a copy of the project: an sdist that can be built, and an installation without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("pybind11", reason="building needs pybind11")
pytest.importorskip("ninja", reason="building needs ninja")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the build reads, without what an earlier build has left in place."""
    copy = tmp_path / "project"
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "eopd_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / file, copy)
    for file in ("README.md", "LICENSE"):
        (copy / file).write_text("for the metadata\n")
    return copy


def setup(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without the CUDA kernels, which take a minute, unless they are asked for."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=project,
        env={**os.environ, "EOPD_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_the_package_installs_and_says_why(project: Path, tmp_path: Path) -> None:
    done = setup(project, "bdist_wheel", "-d", str(tmp_path), CXX="/nonexistent", EOPD_BUILD_CPU="auto")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        record = json.loads(wheel.read("eopd_kernels/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert "eopd_kernels/backends/cpu.py" in names
    assert not [name for name in names if name.startswith("eopd_kernels/testing/")]
    assert {"eopd_kernels/py.typed", "eopd_kernels/_native.pyi", "eopd_kernels/_cuda.pyi"} <= set(names)
    assert {re.sub(r"-.*(\.dist-info)", r"\1", name.partition("/")[0]) for name in names} == {
        "eopd_kernels",
        "eopd_kernels.dist-info",
    }
    assert record["cpu"] == {"built": False, "reason": "no C++ compiler found (looked for /nonexistent)"}


def test_a_compiler_that_fails_is_not_fatal_unless_asked_for(project: Path) -> None:
    done = setup(project, "build_ext", "--inplace", CXX="false", EOPD_BUILD_CPU="auto")
    assert done.returncode == 0, done.stderr
    record = json.loads((project / "eopd_kernels" / "_build.json").read_text())["cpu"]
    assert not record["built"] and "could not compile" in record["reason"]
    assert setup(project, "build_ext", "--inplace", CXX="false", EOPD_BUILD_CPU="1").returncode != 0


def test_it_can_be_left_out(project: Path) -> None:
    done = setup(project, "build_ext", "--inplace", EOPD_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    record = json.loads((project / "eopd_kernels" / "_build.json").read_text())["cpu"]
    assert record == {"built": False, "reason": "left out by EOPD_BUILD_CPU=0"}


def test_a_misspelt_switch_is_an_error(project: Path) -> None:
    done = setup(project, "build_ext", "--inplace", EOPD_BUILD_CPU="yes")
    assert done.returncode != 0 and "EOPD_BUILD_CPU is 'yes'; allowed are 0, 1 and auto" in done.stderr


def cuda_record(project: Path, **environment: str) -> dict[str, object]:
    """What a build that wants the CUDA kernels and nothing else remembers of them."""
    done = setup(project, "build_ext", "--inplace", EOPD_BUILD_CPU="0", **{"EOPD_BUILD_CUDA": "auto", **environment})
    assert done.returncode == 0, done.stderr
    return json.loads((project / "eopd_kernels" / "_build.json").read_text())["cuda"]


def test_without_nvcc_there_are_no_cuda_kernels(project: Path, tmp_path: Path) -> None:
    record = cuda_record(project, CUDA_HOME=str(tmp_path))
    assert record == {"built": False, "reason": f"no nvcc found (looked for {tmp_path}/bin/nvcc)"}
    done = setup(project, "build_ext", "--inplace", CUDA_HOME=str(tmp_path), EOPD_BUILD_CPU="0", EOPD_BUILD_CUDA="1")
    assert done.returncode != 0 and "EOPD_BUILD_CUDA=1: no nvcc found" in done.stderr
    assert cuda_record(project, EOPD_BUILD_CUDA="0")["reason"] == "left out by EOPD_BUILD_CUDA=0"


FAKE_NVCC = """#!/usr/bin/env python3
import sys
from pathlib import Path

with Path(__file__).with_name("calls").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
Path(sys.argv[sys.argv.index("-o") + 1]).write_text("")
if "-MF" in sys.argv:
    Path(sys.argv[sys.argv.index("-MF") + 1]).write_text("")
"""


@pytest.fixture
def fake_cuda(tmp_path: Path) -> Path:
    """A CUDA_HOME whose nvcc remembers what it was asked to do."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def test_every_cuda_source_is_compiled_for_the_architectures_asked_for(project: Path, fake_cuda: Path) -> None:
    record = cuda_record(project, CUDA_HOME=str(fake_cuda), TORCH_CUDA_ARCH_LIST="9.0a 10.0+PTX", EOPD_BUILD_CUDA="1")
    assert record["built"] and record["architectures"] == "9.0a 10.0+PTX"
    *compiled, linked = sorted(
        (fake_cuda / "bin" / "calls").read_text().splitlines(), key=lambda call: "-shared" in call
    )
    for source in (project / "csrc" / "cuda").iterdir():
        calls = [call for call in compiled if f"csrc/cuda/{source.name} " in call]
        assert len(calls) == (source.suffix in (".cu", ".cpp")), source
    for call in compiled:
        assert "-gencode=arch=compute_90a,code=sm_90a" in call
        assert "-gencode=arch=compute_100,code=[sm_100,compute_100]" in call
        assert "-Werror=all-warnings" in call and "-fPIC" in call
    assert "-cudart=static" in linked


def test_no_gpu_between_the_first_and_the_last_is_shut_out(project: Path, fake_cuda: Path) -> None:
    """Code for 9.0a or 10.0a runs on that one only: a B300, 10.3, had no kernels."""
    record = cuda_record(project, CUDA_HOME=str(fake_cuda), TORCH_CUDA_ARCH_LIST="", EOPD_BUILD_CUDA="1")
    assert record["architectures"] == "8.0;9.0;10.0;12.0+PTX"
    call = (fake_cuda / "bin" / "calls").read_text().splitlines()[0]
    codes = re.findall(r"code=\[?sm_(\w+)", call)
    assert codes == ["80", "90", "100", "120"] and "code=[sm_120,compute_120]" in call


def test_a_copy_of_a_project_has_its_build(project: Path, fake_cuda: Path, tmp_path: Path) -> None:
    cuda_record(project, CUDA_HOME=str(fake_cuda), EOPD_BUILD_CUDA="1")
    calls = fake_cuda / "bin" / "calls"
    built = calls.read_text().splitlines()
    copy = tmp_path / "a copy: $1"
    shutil.copytree(project, copy)
    assert cuda_record(copy, CUDA_HOME=str(fake_cuda), EOPD_BUILD_CUDA="1")["built"]
    assert calls.read_text().splitlines() == built
    (copy / "csrc" / "cuda" / "dispatch.cpp").touch()
    cuda_record(copy, CUDA_HOME=str(fake_cuda), EOPD_BUILD_CUDA="1")
    assert len(calls.read_text().splitlines()) == len(built) + 2  # it is compiled, and all are linked


def test_an_architecture_that_is_none_is_named(project: Path, fake_cuda: Path) -> None:
    record = cuda_record(project, CUDA_HOME=str(fake_cuda), TORCH_CUDA_ARCH_LIST="9.0a;Hopper")
    assert record == {
        "built": False,
        "reason": "TORCH_CUDA_ARCH_LIST may hold architectures like 8.0;9.0;10.0;12.0+PTX, got 'Hopper'",
    }


# What git ignores, and what only git reads.
LEFT_OUT = (
    ".git .venv* build dist runs site bench-report gpu-report shared *.so _build.json *.egg-info __pycache__".split()
)
LEFT_OUT += [".*_cache", ".hypothesis", ".benchmarks"]


def test_the_source_distribution_is_the_whole_repository(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT))
    expected = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    done = setup(copy, "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {"csrc/cpu/kernels.cpp", "docs/math.md", "tests/conftest.py", "eopd_kernels/testing/pretend.py"} <= expected
    made = {name for name in names if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == expected


def test_the_oldest_versions_that_are_tested_are_those_that_are_asked_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *asked["dependencies"],
        *(line for extra in ("train", "integrations", "test") for line in asked["optional-dependencies"][extra]),
    ]
    floors = {
        requirement.name: Version(clause.version)
        for requirement in map(Requirement, lines)
        for clause in requirement.specifier
        if clause.operator == ">="
    }
    pins = re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints" / "oldest.txt").read_text(), re.MULTILINE)
    assert floors == {name: Version(version) for name, version in pins}
    python = re.search(r"^versions-oldest: PYTHON := python(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert python is not None and asked["requires-python"] == f">={python.group(1)}"
