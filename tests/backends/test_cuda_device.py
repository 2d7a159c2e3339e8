"""csrc/cuda/launch.cuh beside a runtime that only counts: which calls a launch makes to choose its device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include <cstdio>

#include "cuda/launch.cuh"

static int current = 2;

extern "C" cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
extern "C" cudaError_t cudaSetDevice(int device) { return std::printf("%d ", current = device), cudaSuccess; }
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return ""; }

int main() {
  { const eopd::cuda::OnDevice same(2); }
  std::printf("| ");
  { const eopd::cuda::OnDevice other(5); }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_device_is_set_only_where_it_changes(tmp_path: Path) -> None:
    """cudaSetDevice may make a context, on a device that this process does not use otherwise."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    command = ["nvcc", "-std=c++17", "-cudart=none", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout == "| 5 2 "
