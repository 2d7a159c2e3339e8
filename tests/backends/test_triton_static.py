"""The Triton kernels as machine code for five GPUs, in processes that are not under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest

from eopd_kernels.testing import machine_code

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "row_statistics",
    "merge_parts",
    "row_gradient",
    "row_loss_and_gradient",
    "row_mixture",
    "row_mixture_gradient",
}
DEVICES = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(1800)  # hundreds of compilations


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="class")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("static") / "kernels.json"
    result = run("tests.backends.triton_resources", request.cls.part, str(file))
    assert file.exists(), result.stderr[-3000:]
    return json.loads(file.read_text())


class MachineCode:
    """What holds for each kernel. Several classes, so that test processes share the compiling.

    ``python -m benchmarks.static --all`` is all on all devices, a thousand compilations.
    """

    part: str
    compiled: ClassVar[set[tuple[str, str]]]

    def test_every_kernel_is_compiled_for_every_gpu(self, kernels: list[dict[str, Any]]) -> None:
        assert {(k["kernel"], k["device"]) for k in kernels} == self.compiled

    def test_nothing_spills(self, kernels: list[dict[str, Any]]) -> None:
        assert not [k for k in kernels if k["stack"] != 0]

    def test_shared_memory_suffices(self, kernels: list[dict[str, Any]]) -> None:
        assert not [k for k in kernels if k["shared"] > k["shared_limit"]]

    def test_no_thread_waits_for_another_in_a_loop_over_columns(self, kernels: list[dict[str, Any]]) -> None:
        assert not [k for k in kernels if k["exchanges_in_loops"]]

    def test_logits_are_loaded_as_vectors(self, kernels: list[dict[str, Any]]) -> None:
        assert not [k for k in kernels if k["narrow_loads"]]
        # Where all three dtypes are as wide, a thread loads 16 bytes at once.
        for kernel in kernels:
            sides, _, out = kernel["problem"].split(",")[0].partition(" → ")
            if set(sides.split()) == {out} and kernel["problem"].endswith("even") and kernel["kernel"] != "merge_parts":
                assert max(kernel["load_bits"]) == 128, kernel


class TestAChoiceOnEveryGPU(MachineCode):
    """A covering choice of dtypes and options."""

    part = "choice"
    compiled: ClassVar = set(product(KERNELS, DEVICES))


class TestAllFusedCallsOnOneGPU(MachineCode):
    """The loss and its gradient in one launch, in all that it can be called with."""

    part = "fused"
    compiled: ClassVar = {("row_loss_and_gradient", "sm_90")}


class TestAllCallsApartOnOneGPU(MachineCode):
    """Statistics and gradient by themselves, and the loss of few rows, which is made of them."""

    part = "apart"
    # A row of one column is not split.
    compiled: ClassVar = set(
        product({"row_statistics", "merge_parts", "row_gradient", "row_loss_and_gradient"}, {"sm_90"})
    )


class TestAllMixturesOnOneGPU(MachineCode):
    part = "mixtures"
    compiled: ClassVar = set(product({"row_mixture", "row_mixture_gradient"}, {"sm_90"}))


LOOP = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   {inside} R4, R4, 0x1, 0x1f ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   {after} R4, R4, 0x1, 0x1f ;
        /*0050*/                   BRA 0x50;
"""


def test_an_exchange_counts_in_a_loop_that_loads_and_nowhere_else() -> None:
    def exchanges(text: str) -> tuple[str, ...]:
        found = [machine_code.instruction(match) for match in machine_code.NVIDIA_INSTRUCTION.finditer(text)]
        return machine_code.nvidia_code(0, 0, found).exchanges_in_loops

    assert exchanges(LOOP.format(inside="SHFL.BFLY", after="FADD")) == ("SHFL.BFLY",)
    assert exchanges(LOOP.format(inside="FADD", after="BAR.SYNC")) == ()
    assert exchanges(LOOP.format(inside="BAR.SYNC", after="FADD").replace("LDG", "LDC")) == ()


def test_a_second_batch_size_compiles_nothing() -> None:
    result = run("tests.backends.triton_recompiles")
    assert result.returncode == 0, result.stderr[-3000:]
