"""The native kernels take the OpenMP runtime that torch has loaded; a second one would keep threads of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eopd_kernels.backends import cpu

RUNTIMES = """
import torch
from eopd_kernels import entropy_aware_kl
torch.randn(64, 64) @ torch.randn(64, 64)
entropy_aware_kl(torch.randn(64, 999), torch.randn(64, 999), backend="cpu")
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
print("\\n".join(file for file in files if file.rsplit("/", 1)[1].startswith(("libgomp", "libomp", "libiomp"))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of what a process has loaded")
@pytest.mark.skipif(cpu.unavailable() is not None, reason="the native kernels are not there")
def test_there_is_one_runtime_in_a_process() -> None:
    run = subprocess.run([sys.executable, "-c", RUNTIMES], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1, run.stdout
