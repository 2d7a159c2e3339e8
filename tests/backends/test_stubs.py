"""The stubs of the extensions name what the extensions have, with the same arguments."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import BuiltinFunctionType

import pytest

from eopd_kernels.backends import cpu, cuda

ROOT = Path(__file__).resolve().parents[2]
# What only the emulated module offers, which the stub is not of.
CONTROLS = set(re.findall(r'module\.(?:def|attr)\("(\w+)"', (ROOT / "csrc/emulation/controls.h").read_text()))


@pytest.mark.parametrize(("name", "backend"), [("_native", cpu), ("_cuda", cuda)])
def test_the_stub_has_the_functions_of_the_module(name: str, backend: object) -> None:
    try:
        module = backend.kernels()  # type: ignore[attr-defined]
    except ImportError:
        pytest.skip(f"{name} is not built")
    stub = ast.parse((ROOT / "eopd_kernels" / f"{name}.pyi").read_text())
    expected = {
        node.name: [argument.arg for argument in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    offered = {key for key, value in vars(module).items() if isinstance(value, BuiltinFunctionType)} - CONTROLS
    assert offered == set(expected)
    for key, arguments in expected.items():
        signature = getattr(module, key).__doc__.splitlines()[0]  # as pybind11 writes it: name(task: ..., a: ...)
        assert re.findall(r"(\w+): ", signature) == arguments, signature
