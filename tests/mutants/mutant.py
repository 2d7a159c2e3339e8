"""One thing that is broken on purpose, and where it is."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "eopd_kernels"


class Mutant(NamedTuple):
    """One change of the source: ``original`` becomes ``broken``.

    Args:
        name: what is broken, in a few words.
        where: a function, method, class or constant of the package, which may move to another file: its name, after as
            many names of what it lies in as make it the only one (``HiddenGradient.add``). Or a file of csrc/.
        original: what occurs exactly once there.
        broken: what it becomes.
        tests: the files that are to notice it. Default: the runner's suite.
        package: the folder in which ``where`` is looked for.
    """

    name: str
    where: str
    original: str
    broken: str
    tests: tuple[str, ...] = ()
    package: str = PACKAGE

    def file(self, root: Path) -> Path:
        """The file in which the change is made."""
        return self._place(root)[0]

    def made_in(self, root: Path) -> None:
        """Makes the change in the project at ``root``.

        Raises:
            ValueError: ``where`` names nothing, or several things, or does not hold ``original`` exactly once.
        """
        file, first, last = self._place(root)
        lines = file.read_text().splitlines(keepends=True)
        text = "".join(lines[first:last])
        if (occurrences := text.count(self.original)) != 1:
            raise ValueError(f"{self.name}: {self.original!r} occurs {occurrences} times in {self.where}")
        lines[first:last] = text.replace(self.original, self.broken)
        file.write_text("".join(lines))

    def _place(self, root: Path) -> tuple[Path, int, int]:
        """A file, and the lines of it that ``where`` names, from the first to the one after the last."""
        if "/" in self.where:
            return root / self.where, 0, len((root / self.where).read_text().splitlines())
        places = [
            (file, first, last)
            for file in sorted((root / self.package).rglob("*.py"))
            if "testing" not in file.parts
            for name, first, last in definitions(
                file.read_text(), ".".join(file.relative_to(root).with_suffix("").parts)
            )
            if name.endswith("." + self.where)
        ]
        if len(places) != 1:
            raise ValueError(f"{self.name}: {self.where!r} names {len(places)} things of {self.package}")
        return places[0]


@functools.cache
def definitions(text: str, file: str) -> list[tuple[str, int, int]]:
    """What a file defines: each name after all that it lies in, and its lines, from the first to the one after."""
    tree, module = ast.parse(text), file.removesuffix(".py").replace("/", ".")
    constants = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [(node, node.targets[0] if isinstance(node, ast.Assign) else node.target) for node in constants]
    found = [(f"{module}.{ast.unparse(target)}", node.lineno - 1, node.end_lineno or 0) for node, target in targets]
    return found + list(functions_and_classes(tree, module))


def functions_and_classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Those of a module or class, and those within them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min(part.lineno for part in (node, *node.decorator_list)) - 1
            yield f"{prefix}.{node.name}", first, node.end_lineno or first
            yield from functions_and_classes(node, f"{prefix}.{node.name}")


def noticed_by(tests: tuple[str, ...], mutants: list[Mutant]) -> list[Mutant]:
    """Mutants of a room that has tests of its own, for those that name none."""
    return [mutant._replace(tests=mutant.tests or tests) for mutant in mutants]


def of_the_recipe(tests: str, mutants: list[Mutant]) -> list[Mutant]:
    """Mutants of python/, noticed by files of tests/python/, whose names end so."""
    return [
        m._replace(tests=tuple(f"tests/python/test_{t}.py" for t in tests.split()), package="python") for m in mutants
    ]
