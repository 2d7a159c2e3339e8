"""Where and in which precision something is made follows from the inputs, never from torch's defaults."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eopd_kernels
from eopd_kernels import EntropyGate, Objective, QuantileGate, Skewed, TopK, TopKTeacher, entropy_aware_kl
from tests.conftest import Case, make_case

PACKAGE = Path(eopd_kernels.__file__).parent
# Of these torch takes device and dtype from its defaults, unless told.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a factory of torch's in the package."""
    for path in sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob("testing/*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
                if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_factory_is_told_its_device() -> None:
    found = list(calls())
    assert len(found) > 5
    for place, node in found:
        named = {keyword.arg for keyword in node.keywords}
        if None in named:  # **drawn: info/check.py says all of it in one place
            continue
        assert "device" in named, f"{place} takes the default device"
        from_numbers = ast.unparse(node.func) in ("torch.arange", "torch.tensor")  # integers stay integers
        assert "dtype" in named or from_numbers, f"{place} takes the default dtype"


SAMPLED = Objective(reverse="sampled", forward=TopK(5, teacher="raw", tail=True))
OBJECTIVES = {
    "default": Objective(gate=EntropyGate(2.0)),
    "jsd": Objective.jsd(),
    "skewed": Objective(forward=Skewed(0.2)),
    "forward, gated": Objective(reverse="none", gate=EntropyGate(2.0)),
    "quantile": Objective(gate=QuantileGate(0.5)),
    "sampled": SAMPLED,
}


def problem(name: str, kind: str) -> tuple[Case, Any, dict[str, Any]]:
    """A case, its teacher, and the options of a call."""
    case = make_case(student=kind, teacher=kind, masked=True)
    leading = case.student.shape[:-1]
    options = {"student_head": case.student_head, "teacher_head": case.teacher_head, "mask": case.mask}
    if name in ("sampled", "served"):
        ids = torch.arange(111).view(leading) % 600
        # Far from what the student says now, so that most tokens are clipped.
        options |= {"token_ids": ids, "old_log_probs": torch.full(leading, -9.0)}
    if name != "served":
        return case, case.teacher, {**options, "objective": OBJECTIVES[name]}
    log_probs, token_log_probs = torch.full((*leading, 5), -2.0), torch.full(leading, -9.5)
    teacher = TopKTeacher(ids.unsqueeze(-1) + torch.arange(5), log_probs, token_log_probs=token_log_probs)
    return case, teacher, {**options, "teacher_head": None, "objective": SAMPLED}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("schedule", ["auto", "recompute"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "served"])
def test_another_default_changes_nothing(name: str, kind: str, schedule: str) -> None:
    case, teacher, options = problem(name, kind)

    def outcome() -> list[Tensor]:
        out = entropy_aware_kl(case.student, teacher, **options, schedule=schedule)
        return [out.loss, out.gate, out.forward_half, *torch.autograd.grad(out.loss, case.leaves)]

    usual = outcome()
    with torch.device("meta"):
        elsewhere = outcome()
    with default_dtype(torch.float64):
        wider = outcome()
    assert any((gradient != 0).any() for gradient in usual[3:])
    for a, *others in zip(usual, elsewhere, wider, strict=True):
        for b in others:
            assert (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
