"""Two copies of the package in one process, one of them under another name: each is itself alone, and they agree."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eopd_kernels
from tests.conftest import size
from tests.test_compile import fresh_compiler

__all__ = ["fresh_compiler"]  # a fixture, which takes effect by being here


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package with its extensions, as another project would carry it along."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "testing")
    shutil.copytree(Path(eopd_kernels.__file__).parent, folder / "vendored" / "eopd_kernels", ignore=ignored)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("vendored.eopd_kernels")
    sys.path.remove(str(folder))


class Training:
    """A small student that a copy of the package distils."""

    def __init__(self, package: ModuleType, options: dict[str, Any], compiled: bool, vocab_size: int = 67) -> None:
        torch.manual_seed(0)
        self.package, self.options = package, options
        self.body = nn.Linear(5, 8)
        self.head, self.teacher_head = (nn.Parameter(torch.randn(vocab_size, width)) for width in (8, 6))
        self.step = torch.compile(self.loss, backend="aot_eager", fullgraph=True) if compiled else self.loss

    def loss(self, inputs: Tensor, teacher_hidden: Tensor) -> Tensor:
        student_head, teacher_head = map(self.package.LMHead, (self.head, self.teacher_head.detach()))
        heads = {"student_head": student_head, "teacher_head": teacher_head}
        return self.package.entropy_aware_kl(self.body(inputs), teacher_hidden, **heads, **self.options).loss

    def __call__(self, seed: int) -> list[Tensor]:
        """The loss of one step, its gradients, and what the student then is."""
        drawn = torch.Generator().manual_seed(seed)
        loss = self.step(torch.randn(7, 5, generator=drawn), 2 * torch.randn(7, 6, generator=drawn))
        parameters = (*self.body.parameters(), self.head)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        return [loss.detach(), *gradients, *(parameter.detach().clone() for parameter in parameters)]


def train_in_turns(copy: ModuleType, options: dict[str, Any], compiled: bool, vocab_size: int = 67) -> None:
    """Three steps of this package's and of a copy's training, which must give the same numbers to the last bit."""
    ours, theirs = (Training(package, options, compiled, vocab_size) for package in (eopd_kernels, copy))
    for seed in range(3):
        expected, found = ours(seed), theirs(seed)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not torch.equal(found[-1], theirs(3)[-1])


def check_apart(copy: ModuleType) -> None:
    """A copy has its own modules, functions, classes and ops, and nothing of the package of this repository."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{copy.__name__}.")]
    assert len(modules) > 40
    for module in (copy, *modules):
        owners = {str(getattr(value, "__module__", None)) for value in vars(module).values()}
        assert "eopd_kernels" not in {owner.split(".")[0] for owner in owners}, module
    ops = [op for functions in rows_of(copy).FUNCTIONS.values() for op in functions]
    assert {op.namespace for op in ops} == {copy.__name__.replace(".", "_")}


def rows_of(copy: ModuleType) -> Any:
    return importlib.import_module(f"{copy.__name__}.rows")


def test_each_has_its_own(copy: ModuleType) -> None:
    check_apart(copy)
    assert {op.namespace for functions in rows_of(eopd_kernels).FUNCTIONS.values() for op in functions} == {
        "eopd_kernels"
    }


def test_they_train_alike_in_turns(copy: ModuleType, backend: str) -> None:
    assert rows_of(copy).BACKENDS[backend].unavailable() is None
    for schedule in ("chunked", "recompute"):
        train_in_turns(copy, {"backend": backend, "schedule": schedule}, False, size(backend).get("vocab_size", 67))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_compiled_they_train_alike_in_turns(copy: ModuleType, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own ops: another's would give the same numbers, until one of the two changes."""
    calls: list[tuple[str, str]] = []

    def count(package: ModuleType, name: str) -> None:
        function = getattr(package.compiled, name)

        def counted(*arguments: Any) -> Any:
            calls.append((package.__name__, name))
            return function(*arguments)

        monkeypatch.setattr(package.compiled, name, counted)

    for package in (eopd_kernels, copy):
        count(package, "solve")
        count(package, "solve_again")
    train_in_turns(copy, {"schedule": schedule}, True)
    both = ["solve"] if schedule == "chunked" else ["solve", "solve_again"]
    turn = [(package.__name__, name) for package in (eopd_kernels, copy) for name in both]
    assert calls == 3 * turn + turn[len(both) :]


def test_what_the_other_copy_made_is_refused(copy: ModuleType) -> None:
    student, teacher = torch.randn(2, 3, 67)
    with pytest.raises(TypeError, match="Objective"):
        copy.entropy_aware_kl(student, teacher, objective=eopd_kernels.Objective())
    hidden, weight = torch.randn(3, 8), torch.randn(67, 8)
    with pytest.raises(TypeError, match="LMHead"):
        copy.entropy_aware_kl(hidden, teacher, student_head=eopd_kernels.LMHead(weight))
