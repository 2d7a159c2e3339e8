"""python -m eopd_kernels.info, and the names the package offers."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import eopd_kernels
from eopd_kernels import info
from eopd_kernels.backends import cpu, cuda


def test_it_names_every_backend() -> None:
    run = subprocess.run([sys.executable, "-m", "eopd_kernels.info"], capture_output=True, text=True, check=True)
    assert re.sub(r"\d+ thread", "n thread", run.stdout).splitlines() == [
        re.sub(r"\d+ thread", "n thread", line) for line in info.lines()
    ]
    assert "  torch   available: " in run.stdout and eopd_kernels.__version__ in run.stdout


@pytest.mark.parametrize(("policy", "said"), [(None, True), ("active", True), ("PASSIVE", False), ("passive", False)])
def test_it_says_when_threads_spin(policy: str | None, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(info.WAIT_POLICY, raising=False)
    if policy is not None:
        monkeypatch.setenv(info.WAIT_POLICY, policy)
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert any("threads spin" in line for line in info.lines()) is said
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler found")
    assert not any("threads spin" in line for line in info.lines())


@pytest.mark.parametrize("there", [True, False])
def test_it_says_whether_the_processor_multiplies_bf16(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("eopd_kernels._native")
    kernels = SimpleNamespace(
        **{name: getattr(cpu.kernels(), name) for name in ("capability", "capabilities", "openmp")}
    )
    kernels.multiplies_bfloat16 = lambda: there
    monkeypatch.setattr(cpu, "kernels", lambda: kernels)
    assert ("; bf16 products" in cpu.description()) is there


def test_it_says_why_a_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler found")
    report = "\n".join(info.lines())
    assert "  cpu     not available: no C++ compiler found" in report
    assert "backend='auto' takes 'torch' for CPU tensors" in report
    with pytest.raises(ValueError, match="backend='cpu' is not available: no C\\+\\+ compiler found"):
        eopd_kernels.entropy_aware_kl(*(2 * [eopd_kernels.info.torch.zeros(2, 3)]), backend="cpu")  # type: ignore[attr-defined]


def test_it_explains_what_auto_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, expected in (("no nvcc found", "'torch'"), (None, "'cuda' where a row fits on the chip")):
        monkeypatch.setattr(cuda, "unavailable", lambda reason=reason: reason)
        monkeypatch.setattr(cuda, "takes", lambda device: True)
        assert f"CPU tensors, {expected}" in info.lines()[-2]


def test_it_says_what_fp32_products_on_a_gpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, expected in (("tf32", "TF32"), ("ieee", "fp32;")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        assert f"products in {expected}" in info.lines()[-1]


def test_every_public_name_has_a_docstring() -> None:
    for name in eopd_kernels.__all__:
        assert (getattr(eopd_kernels, name).__doc__ or "").strip(), name
