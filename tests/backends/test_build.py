"""setup.py in a copy of the project: an sdist that can be built, and an installation without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=project,
        env={**os.environ, **environment},
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


def test_the_source_distribution_has_the_kernels(project: Path, tmp_path: Path) -> None:
    done = setup(project, "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert sources <= names
