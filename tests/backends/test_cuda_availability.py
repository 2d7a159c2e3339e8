"""Why there are no CUDA kernels, each reason as ``python -m eopd_kernels.info`` says it; where they are launched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eopd_kernels.backends import cuda as backend
from eopd_kernels.backends import native

H100 = {
    "name": "H100",
    "capability": (9, 0),
    "multiprocessors": 132,
    "threads_per_block": 1024,
    "largest_cluster": 16,
    "shared_per_block": 232_448,
    "shared_per_multiprocessor": 233_472,
    "shared_reserved": 1024,
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The record says that the extension is built, and torch has CUDA."""
    record_of_the_build(tmp_path, monkeypatch, {"built": True})
    monkeypatch.setattr(backend, "unavailable", backend.unavailable.__wrapped__)
    monkeypatch.setattr(backend, "device_on", backend.device_on.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)


def record_of_the_build(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: dict[str, Any]) -> None:
    (folder / "_build.json").write_text(json.dumps({"cuda": cuda}))
    monkeypatch.setattr(native, "RECORD", folder / "_build.json")


def raising(error: Exception) -> Any:
    def function(*arguments: Any) -> Any:
        raise error

    return function


def extension(device_count: Any = lambda: 1, properties: Any = lambda device: H100) -> Any:
    return lambda: SimpleNamespace(
        device_count=device_count, properties=properties, device_type="cuda", driver=torch.cuda
    )


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the current device is asked, or every process of a node would open a context on the first."""
    asked: list[int] = []

    def properties(device: int) -> dict[str, Any]:
        asked.append(device)
        return H100

    monkeypatch.setattr(backend, "kernels", extension(properties=properties))
    assert backend.unavailable() is None and asked == [3]


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        (
            raising(ImportError("undefined symbol")),
            "the CUDA kernels were built but cannot be loaded: undefined symbol",
        ),
        (extension(raising(RuntimeError("no driver"))), "there is no CUDA device (no driver)"),
        (extension(lambda: 0), "there is no CUDA device"),
        (
            extension(properties=raising(RuntimeError("no kernel image"))),
            "the CUDA kernels do not run on this device (no kernel image); "
            "TORCH_CUDA_ARCH_LIST names others for a build",
        ),
    ],
)
def test_the_extension_does_not_help(monkeypatch: pytest.MonkeyPatch, native: Any, reason: str) -> None:
    monkeypatch.setattr(backend, "kernels", native)
    assert backend.unavailable() == reason


def test_it_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "kernels", raising(ModuleNotFoundError("_cuda")))
    record_of_the_build(tmp_path, monkeypatch, {"built": False, "reason": "no nvcc found"})
    assert backend.unavailable() == "the CUDA kernels were not built: no nvcc found"


def test_a_build_that_failed_with_another_python_is_no_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place all of them write one record."""
    monkeypatch.setattr(backend, "kernels", extension())
    record_of_the_build(tmp_path, monkeypatch, {"built": False, "reason": "no nvcc found"})
    assert backend.unavailable() is None


def test_this_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "kernels", extension())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backend.unavailable() == f"this torch ({torch.__version__}) has no CUDA"


def test_a_launch_goes_to_torch_s_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "kernels", extension())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device.index))
    tensor: Any = SimpleNamespace(device=torch.device("cuda", 2))
    assert backend.place_of(tensor) == (2, 72)
    assert backend.index_of(torch.device("cuda")) == 3
