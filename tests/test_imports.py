"""Who may import whom: tests stand on the package, and the package does not stand on its emulated devices."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports, anywhere in it, by their full names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [*parts[: -node.level], *filter(None, [node.module])] if node.level else [node.module or ""]
            yield from (".".join([*package, alias.name]) for alias in node.names)


def importers(folder: str, module: str) -> set[str]:
    """Returns the files of a folder that import a module or something in it."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if any(f"{name}.".startswith(f"{module}.") for name in imported(path))
    }


def test_only_the_tests_of_the_benchmarks_import_them() -> None:
    found = importers("tests", "benchmarks")
    assert found and all(name.startswith("tests/benchmarks/") for name in found)


def test_the_package_works_without_its_emulated_devices() -> None:
    found = importers("eopd_kernels", "eopd_kernels.testing")
    assert all(name.startswith("eopd_kernels/testing/") for name in found)
    assert importers("tests", "eopd_kernels.testing")
