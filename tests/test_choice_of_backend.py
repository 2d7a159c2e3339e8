"""The choice of a backend: by name, and "auto" by the device and the logits."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from eopd_kernels import LMHead, entropy_aware_kl, info
from eopd_kernels.rows import BACKENDS, FUNCTIONS, Logits, RowFunctions, automatic, choose
from eopd_kernels.testing.data_sheets import DEVICES


@pytest.mark.parametrize("name", ["gpu", "", None, "CPU"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    known = r"\('cpu', 'cuda', 'triton', 'torch'\)"
    with pytest.raises(ValueError, match=rf"backend must be 'auto' or one of {known}, got"):
        choose(name, torch.device("cpu"))


def test_the_native_backend_takes_cpu_tensors_only() -> None:
    with pytest.raises(ValueError, match="backend='cpu'"):
        choose("cpu", torch.device("meta"))
    assert choose("auto", torch.device("meta")) is FUNCTIONS["torch"]


def test_triton_takes_cpu_tensors_under_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", torch.device("cpu")) is FUNCTIONS["triton"]
    with pytest.raises(ValueError, match="backend='triton' takes CUDA and ROCm tensors"):
        choose("triton", torch.device("meta"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="CPU tensors under TRITON_INTERPRET=1 only, got tensors on cpu"):
        choose("triton", torch.device("cpu"))
    assert choose("triton", torch.device("cuda")) is FUNCTIONS["triton"]


def test_auto_takes_triton_on_a_gpu_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for reason, expected in ((None, "triton"), ("triton is not installed", "torch")):
        monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda reason=reason: reason)
        assert choose("auto", torch.device("cuda")) is FUNCTIONS[expected]


BF16_ROW = Logits(151_936, torch.bfloat16, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA and Triton kernels are there, and the device is an H100."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(BACKENDS["cuda"], "kernels", lambda: SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda: None)
    monkeypatch.setattr(BACKENDS["cuda"], "unavailable", lambda: None)
    monkeypatch.setattr(BACKENDS["cuda"], "index_of", lambda device: 0)
    monkeypatch.setattr(BACKENDS["cuda"], "device_on", lambda index: DEVICES["H100"])


def test_auto_takes_cuda_where_a_row_is_read_once(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert choose("auto", gpu, BF16_ROW) is FUNCTIONS["cuda"]
    assert choose("auto", gpu, Logits(151_936, torch.float32, torch.bfloat16)) is FUNCTIONS["cuda"]
    for logits in (None, BF16_ROW._replace(vocab_size=2_000_000), BF16_ROW._replace(teacher=torch.float64)):
        assert choose("auto", gpu, logits) is FUNCTIONS["triton"]
    assert choose("auto", torch.device("meta"), BF16_ROW) is FUNCTIONS["torch"]
    monkeypatch.setattr(BACKENDS["cuda"], "device_on", lambda index: DEVICES["A100"])
    assert choose("auto", gpu, BF16_ROW) is FUNCTIONS["triton"]


def test_auto_takes_triton_where_there_is_no_cuda(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cuda"], "unavailable", lambda: "no nvcc found")
    assert choose("auto", torch.device("cuda"), BF16_ROW) is FUNCTIONS["triton"]
    monkeypatch.setattr(BACKENDS["cuda"], "unavailable", lambda: None)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert choose("auto", torch.device("cuda"), BF16_ROW) is FUNCTIONS["triton"]
    with pytest.raises(ValueError, match="backend='cuda' takes CUDA tensors, not ROCm's, got tensors on cuda"):
        choose("cuda", torch.device("cuda"))


def test_every_choice_can_be_forced(hopper: None) -> None:
    for name in ("cuda", "triton", "torch"):
        assert choose(name, torch.device("cuda"), BF16_ROW) is FUNCTIONS[name]
    with pytest.raises(ValueError, match="backend='cuda' takes CUDA tensors"):
        choose("cuda", torch.device("cpu"))


@pytest.mark.parametrize(("head", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_auto_is_told_what_the_kernels_will_be_given(
    monkeypatch: pytest.MonkeyPatch, head: bool, expected: torch.dtype
) -> None:
    """Hidden states become blocks of fp32 logits, logits stay what they are; the width is the common vocabulary's."""
    seen = []

    def choose_torch(*arguments: object) -> RowFunctions:
        seen.append(arguments)
        return FUNCTIONS["torch"]

    monkeypatch.setattr("eopd_kernels.schedules.solve.choose", choose_torch)
    student = torch.zeros(2, 30, dtype=torch.bfloat16)
    heads = LMHead(torch.zeros(30, 30, dtype=torch.bfloat16)) if head else None
    entropy_aware_kl(student, torch.zeros(2, 40), student_head=heads, vocab_size=20)
    assert seen == [("auto", student.device, Logits(20, expected, torch.float32))]


def test_the_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("EOPD_BACKEND", "torch")
    assert choose("auto", cpu) is FUNCTIONS["torch"]
    assert "EOPD_BACKEND=torch: every 'auto' means that." in info.lines()
    monkeypatch.setenv("EOPD_BACKEND", "cpu")
    with pytest.raises(ValueError, match="EOPD_BACKEND='cpu' takes CPU tensors"):
        choose("auto", torch.device("xpu"))
    monkeypatch.setenv("EOPD_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"EOPD_BACKEND must be 'auto' or one of .*, got 'gpu'"):
        choose("auto", cpu)
    assert choose("torch", cpu) is FUNCTIONS["torch"]
    monkeypatch.setenv("EOPD_BACKEND", "auto")
    assert choose("auto", cpu) is FUNCTIONS[automatic(cpu)]


def test_importing_the_package_does_not_import_triton() -> None:
    check = "import sys, eopd_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


WITHOUT_A_COMPILER = """
import warnings, torch
from eopd_kernels import entropy_aware_kl, info
from eopd_kernels.backends import cpu
cpu.unavailable = lambda: "no C++ compiler found"
student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    info.lines()
    entropy_aware_kl(student, teacher, backend="torch")
    assert not caught
    function = lambda: entropy_aware_kl(student, teacher).loss
    if {compiled}:
        function = torch.compile(function, fullgraph=True, backend="eager")
    for _ in range(3):
        function().backward()
ours = [str(warning.message) for warning in caught if "eopd" in str(warning.message)]
assert len(ours) == 1, ours
assert "plain PyTorch, which takes 2 to 10 times as long as the native kernels: no C++ compiler found" in ours[0], ours
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_missing_compiler_is_said_once_and_what_it_costs(compiled: bool) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER.replace("{compiled}", str(compiled))], check=True)
