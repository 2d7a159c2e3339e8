"""The public names have an example in their docstring, and every example of the package runs."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch

import eopd_kernels

PACKAGE = Path(eopd_kernels.__file__).parent


def examples() -> dict[str, str]:
    """By file and name of what is documented: the block under "Example::"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            block = re.search(r"^( *)Example::\n\n((?:\1 +.*\n?|\n)+)", (ast.get_docstring(node) or "") + "\n", re.M)
            if block is not None:
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = textwrap.dedent(block[2])
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    public = {key: getattr(eopd_kernels, key) for key in eopd_kernels.__all__}
    torch.manual_seed(0)
    exec(compile(EXAMPLES[name], name, "exec"), {"torch": torch, **public})


@pytest.mark.parametrize("name", eopd_kernels.__all__)
def test_a_public_name_has_an_example(name: str) -> None:
    """Of its own, on a method, or in that of the function that returns it."""
    members = vars(getattr(eopd_kernels, name)) if isinstance(getattr(eopd_kernels, name), type) else {}
    shown = {key.rsplit(":", 1)[1] for key in EXAMPLES}
    assert shown & {name, *members} or name == "EntropyAwareKLOutput"
