"""Writes the folder that the package `kernels` loads this package from, to be published on the Hub.

    python python/hub.py [--out dist/hub]

The folder has one build, `torch-universal`: the modules of the wheel, which are Python and Triton. The adapters stay
out, because a kernel of the Hub imports torch and itself alone, and so do the native and the CUDA kernels, whose
extensions are made for one version of Python each. docs/guides/hub.md has what that costs, and how to publish.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "eopd_kernels.integrations"
# Where the package looks for the reason why it has no extension.
RECORD = {"built": False, "reason": "a folder from the Hub has none, `pip install` of the package builds them"}


def write(out: Path) -> dict[str, Any]:
    """Writes the folder, without what an older one left there, and returns its metadata."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = out / "build" / "torch-universal"
    shutil.rmtree(build, ignore_errors=True)
    for package in pyproject["tool"]["setuptools"]["packages"]:
        if package != LEFT_OUT:
            folder = build.joinpath(*package.split(".")[1:])
            folder.mkdir(parents=True)
            for module in ROOT.joinpath(*package.split(".")).glob("*.py"):
                shutil.copy(module, folder)
    shutil.copy(ROOT / "LICENSE", build)
    (build / "_build.json").write_text(json.dumps({"cpu": RECORD, "cuda": RECORD}, indent=2) + "\n")
    files = digests(build)
    metadata = {
        "name": pyproject["project"]["name"],
        "id": identifier(files),
        "version": major_version(),
        "license": pyproject["project"]["license"],
        "python-depends": [],
        "backend": {"type": "cuda"},  # one has to be named; the loader goes by the name of the build
        "digest": {"algorithm": "sha256", "files": files},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata


def digests(build: Path) -> dict[str, str]:
    """The SHA-256 of every file, in base64, by its path."""
    files = sorted(path for path in build.rglob("*") if path.is_file())
    return {
        path.relative_to(build).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def identifier(files: dict[str, str]) -> str:
    """The name that the loader gives the package, and so the namespace of its ops: another one for every content."""
    return "eopd_kernels_" + hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]


def major_version() -> int:
    """What users of a kernel pin; 0 is for kernels whose interface may change."""
    text = (ROOT / "eopd_kernels" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "(\d+)\.', text, re.MULTILINE)
    assert match is not None
    return int(match[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the folder that the package `kernels` loads.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub", help="the folder, default dist/hub")
    out = parser.parse_args().out
    metadata = write(out)
    print(f"{out}: {metadata['id']}, {len(metadata['digest']['files'])} files, version {metadata['version']}")


if __name__ == "__main__":
    main()
