"""The package is built as docs/design.md says: imports go down, in no circle, and a call takes the way shown there."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import traceback
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from eopd_kernels import entropy_aware_kl
from eopd_kernels.rows import BACKENDS, FUNCTIONS
from tests.test_rows import ADD, IDENTITY, block

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "eopd_kernels"
PAGE = (ROOT / "docs" / "design.md").read_text()
# Module by name ("schedules.solve"; a package by its folder's), as far as it is in the wheel.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def table() -> dict[str, list[str]]:
    """The folders and modules of the page, top first, each with its modules."""
    rows = re.findall(r"^\| `(\w+)/?` \|([^|]*)\|", PAGE, re.MULTILINE)
    return {name: re.findall(r"`(\w+)/?`", modules) for name, modules in rows}


def imports(module: str) -> set[str]:
    """What a module of the package imports of the package, also lazily and for types only."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("eopd_kernels") for alias in node.names), (
                module,
                "import eopd_kernels.x",
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        source = (node.module or "").split(".") if node.module else []
        if node.level:
            source = package[: len(package) - node.level + 1] + source
        else:
            assert source[:1] != ["eopd_kernels"], (module, "from eopd_kernels.x: not its own in a copy")
            continue
        for alias in node.names:
            if not source and (PACKAGE / f"{alias.name}.pyi").exists():  # an extension, which imports nothing
                continue
            whole = ".".join([*source, alias.name])
            found.add(whole if whole in MODULES else ".".join(source) or "__init__")
    return found - {module}


def test_the_page_names_every_module_and_no_other() -> None:
    named = {name for name, modules in table().items() if not modules}
    named |= {f"{folder}.{module}" for folder, modules in table().items() for module in modules}
    # The folder of a backend has a page or a table of its own.
    there = {module for module in MODULES if not re.match(r"testing\.|backends\.(cuda|triton)\.", module)}
    assert named == {m for m in there if MODULES[m].name != "__init__.py" or m in ("__init__", "testing")} | {
        "backends.cuda",
        "backends.triton",
    }
    assert sum(not modules for modules in table().values()) <= 11  # ten at the top level, and testing/


def test_imports_go_down() -> None:
    order = list(table())
    for module in MODULES:
        here = order.index(module.split(".")[0])
        for imported in imports(module):
            there = order.index(imported.split(".")[0])
            assert there > here or (there == here and "." in module), f"{module} imports {imported}, which is above it"


def test_imports_go_in_no_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_only_the_seam_knows_backends() -> None:
    for module in MODULES:
        if module.split(".")[0] not in ("rows", "backends", "testing"):
            assert not any(imported.startswith("backends") for imported in imports(module)), module


def test_backends_know_nothing_above_them() -> None:
    for module in MODULES:
        if module.split(".")[0] in ("backends", "row_math"):
            known = {imported.split(".")[0] for imported in imports(module)}
            assert known <= {"backends", "row_math", "tensors"}, module


def test_tests_import_no_benchmark() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if path.parent.name != "benchmarks":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.split(".")[0] == "benchmarks" for name in names), path


def way(backend: str) -> list[tuple[str, str]]:
    """The calls of the page down to a backend's kernel: (function, file)."""
    block = re.search(r"```text\n(entropy_aware_kl.*?)```", PAGE, re.DOTALL)
    assert block is not None
    lines = [line.split() for line in block[1].splitlines()]
    shared = [(name, file) for name, file, *_ in lines if "backends/" not in file and "csrc/" not in file]
    below = {"triton": "backends/triton/", "cuda": "csrc/"}[backend]
    return shared + [(name, file) for name, file, *_ in lines if file.startswith(below)]


@pytest.mark.parametrize(("backend", "most"), [("triton", 8), ("cuda", 10)])
def test_a_call_takes_the_way_that_the_page_shows(backend: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = way(backend)
    assert len(expected) <= most
    in_python = [(name, file) for name, file in expected if not file.startswith("csrc/")]
    name, file = in_python[-1]
    seen: list[list[tuple[str, str]]] = []

    def follow(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name != name.split(".")[-1] or not code.co_filename.endswith(file):
            return
        stack, at = [], frame
        while at is not None:
            if Path(at.f_code.co_filename).is_relative_to(PACKAGE):
                path = Path(at.f_code.co_filename).relative_to(PACKAGE)
                stack.append((at.f_code.co_qualname.split("<locals>.")[-1], str(path)))
            at = at.f_back  # type: ignore[assignment]
        seen.append(stack[::-1])

    student = torch.randn(3, 40, requires_grad=True)
    teacher = torch.randn(3, 40)
    sys.setprofile(follow)
    try:
        entropy_aware_kl(student, teacher, backend=backend)
    finally:
        sys.setprofile(None)
    assert seen and seen[0] == in_python
    for name, file in expected[len(in_python) :]:  # of C++ it is enough that it is there
        assert re.search(rf"\b{name.split('<')[0]}\b", (ROOT / file).read_text()), (name, file)


def frames_of_the_package() -> list[str]:
    """Who is being called, from the outside in, as ``file: function``."""
    inside = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
    return [f"{Path(frame.filename).name}: {frame.name}" for frame in inside]


@pytest.mark.parametrize(("name", "rows"), [("cpu", 5), ("cuda", 5), ("triton", 1), ("triton", 5)])
def test_a_kernel_is_a_few_frames_below_the_seam(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python adds to a launch: the seam, and in Triton the function that launches."""
    if BACKENDS[name].unavailable() is not None or (name == "triton" and os.environ.get("TRITON_INTERPRET") != "1"):
        pytest.skip(f"backend {name!r} is not available")
    seen = []
    if name == "triton":
        executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
        launch = executor.__call__

        def launched(self: object, *arguments: object, **options: object) -> None:
            seen.append(frames_of_the_package())
            launch(self, *arguments, **options)

        monkeypatch.setattr(executor, "__call__", launched)
        expected = ["rows.py: row_loss_and_gradient", "launch.py: row_loss_and_gradient"]
    else:
        kernels = BACKENDS[name].kernels()
        functions = {"row_loss_and_gradient": lambda task, **arguments: seen.append(frames_of_the_package())}
        monkeypatch.setattr(BACKENDS[name], "kernels", lambda: SimpleNamespace(**{**vars(kernels), **functions}))
        expected = ["rows.py: row_loss_and_gradient"]
    student, teacher = block(rows, 3000)
    FUNCTIONS[name].row_loss_and_gradient(student, teacher, torch.ones(rows), 0.8, list(ADD), IDENTITY, student)
    assert seen == [expected] * (3 if (name, rows) == ("triton", 1) else 1)
