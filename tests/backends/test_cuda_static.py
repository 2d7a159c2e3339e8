"""The CUDA kernels as nvcc has compiled them, for each GPU: what a compiler has to have done for the plans to hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from eopd_kernels.backends import native
from eopd_kernels.backends.cuda.plan import NOTHING, REGISTERS, SHARED
from eopd_kernels.testing import column_loops, emulation, machine_code
from eopd_kernels.testing.machine_code import KERNELS, Kernel

PAIRS = {(student, teacher) for student in ("32", "16") for teacher in ("32", "16")}

pytestmark = pytest.mark.skipif(machine_code.why_not() is not None, reason=str(machine_code.why_not()))


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return machine_code.kernels()


def test_every_instantiation_is_there_for_every_gpu(kernels: list[Kernel]) -> None:
    wanted = {(name, *pair, NOTHING) for name in KERNELS for pair in (*PAIRS, ("any", "any"))}
    wanted |= {("row_loss_and_gradient", *pair, kept) for pair in PAIRS for kept in (SHARED, REGISTERS)}
    record = json.loads(native.RECORD.read_text())["cuda"]
    for architecture in record["architectures"].replace(".", "").replace("+PTX", "").split(";"):
        found = {(k.name, k.student, k.teacher, k.kept) for k in kernels if k.architecture == f"sm_{architecture}"}
        assert found == wanted, architecture


def test_nothing_spills_and_two_ctas_share_a_multiprocessor(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.registers <= kernel.most_registers, kernel


def test_aligned_rows_move_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.exists and kernel.student != "any":
            assert kernel.wide_loads > 0, kernel
            assert kernel.wide_stores > 0 or not kernel.writes, kernel


def test_clusters_write_distributed_shared_memory(kernels: list[Kernel]) -> None:
    """All of a CTA's numbers, between two of the cluster's barriers; before sm_90 there is neither."""
    for kernel in kernels:
        numbers = 4 if kernel.name == "row_mixture" else 8
        if kernel.exists:
            assert (kernel.distributed_stores >= numbers) == kernel.merges, kernel
            assert (kernel.cluster_barriers >= 2) == kernel.merges, kernel


def test_a_column_takes_few_instructions() -> None:
    """float32 logits, a gradient in 16 bits, rows in shared memory on sm_90; docs/cuda.md has the counts."""
    file = machine_code.extension()
    assert file is not None
    code = machine_code.sass(file, "sm_90", r"row_loss_and_gradient.*Bits32ES3_.*KeptE1")
    found = column_loops.per_column(code, 4, ".64")
    assert found is not None and 16 < min(found) and sum(found) <= 60, found


def test_a_kernel_that_is_not_as_it_should_be_is_called_so(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.problems] == []
    kernel = next(k for k in kernels if k.kept == SHARED and k.architecture == "sm_90")
    for field in ("wide_loads", "wide_stores", "distributed_stores", "cluster_barriers"):
        assert len(Kernel(**{**vars(kernel), field: 0}).problems) == 1
    for field in ("stack", "registers"):
        assert len(Kernel(**{**vars(kernel), field: 1 + kernel.most_registers}).problems) == 1


def test_the_extension_imports_without_a_driver_and_says_so() -> None:
    """In a process of its own, because this one may run the emulated kernels."""
    environment = {name: value for name, value in os.environ.items() if name != emulation.VARIABLE}
    check = "from eopd_kernels.backends import cuda; print(cuda.kernels().__name__, cuda.unavailable())"
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    name, _, reason = done.stdout.partition(" ")
    assert name == "eopd_kernels._cuda"
    assert reason.startswith(("there is no CUDA device", "this torch", "None")), reason
