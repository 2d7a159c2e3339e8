"""``python -m tests.gpu.build``: the CUDA kernels in place, by this Python's setuptools, pybind11 and ninja.

It takes nothing from a registry and makes no virtual environment. Status 1: a backend is missing all the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from eopd_kernels import info
from eopd_kernels.backends import cuda
from eopd_kernels.rows import BACKENDS
from eopd_kernels.testing.steps import ROOT

FOLDER, RECORD = ROOT / "build" / "gpu", "_build.json"


def main() -> int:
    installed = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
    Path(os.environ.get("OUT", FOLDER), "environment.txt").write_text("\n".join(installed) + "\n")
    build()
    print("\n".join(info.lines()), flush=True)
    missing = [f"{name}: {why}" for name in ("cuda", "triton") if (why := BACKENDS[name].unavailable())]
    print("; ".join(missing) or f"{cuda.description()}; Triton")
    return 1 if missing else 0


def build() -> None:
    """Runs setup.py away from pyproject.toml, which older setuptools cannot read, and takes its CUDA kernels in.

    Without a GPU nothing is compiled and nothing taken: the kernels are emulated there.
    """
    there = torch.cuda.is_available()
    environment = os.environ | {
        "EOPD_BUILD_CPU": "0",
        "EOPD_BUILD_CUDA": "auto" if there else "0",
        "NVCC_APPEND_FLAGS": "-lineinfo",
        "PYTHONPATH": "",  # where something may be being installed meanwhile
    }
    if there:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    subprocess.run(command, cwd=FOLDER, env=environment, check=False)
    if there:
        take(FOLDER / "lib" / "eopd_kernels", ROOT / "eopd_kernels")
        importlib.invalidate_caches()


def take(built: Path, package: Path) -> None:
    """Moves the module to the package, and what its build has recorded; the CPU's kernels stay as they are."""
    for module in built.glob("_cuda*"):
        module.replace(package / module.name)
    records = [json.loads(path.read_text()) for path in (package / RECORD, built / RECORD) if path.exists()]
    known = records[0] if len(records) > 1 else {}
    (package / RECORD).write_text(json.dumps(known | {"cuda": records[-1]["cuda"]}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
