"""One list of keywords: each function shows it, and refuses what is not on it in its own name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eopd_kernels import EntropyAwareKL, EntropyAwareKLLoss, entropy_aware_kl, reference
from eopd_kernels.inputs.keywords import ALL, DEFAULTS, MODULE, REFERENCE, TENSORS

S = torch.randn(2, 5)
HEADS = {"student_head", "teacher_head"}
FUNCTIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "entropy_aware_kl": (entropy_aware_kl, set(ALL)),
    "EntropyAwareKL.apply": (EntropyAwareKL.apply, set(ALL) - HEADS),
    "EntropyAwareKLLoss": (lambda student, teacher, **keywords: EntropyAwareKLLoss(**keywords), {"objective", *MODULE}),
    "EntropyAwareKLLoss.forward": (EntropyAwareKLLoss().forward, set(TENSORS)),
    "eopd_kernels.reference.entropy_aware_kl": (reference.entropy_aware_kl, set(REFERENCE)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_keyword_is_refused_in_the_name_of_the_function_that_was_called(name: str) -> None:
    function, taken = FUNCTIONS[name]
    with pytest.raises(TypeError) as caught:
        function(S, S, tua=0.8)
    assert str(caught.value).startswith(f"{name}() got an unexpected keyword argument 'tua'")
    for keyword in set(ALL) - taken:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            function(S, S, **{keyword: None})


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("alpha", r"objective=Objective\(alpha=\.\.\.\)"),
        ("temperature", r"objective=Objective\(temperature=\.\.\.\)"),
        ("tau", r"objective=Objective\(gate=EntropyGate\(\.\.\.\)\)"),
        ("labelz", "'labels' is one"),
        ("xyz", "takes student_head, teacher_head, mask"),
    ],
)
def test_an_error_says_what_may_have_been_meant(keyword: str, meant: str) -> None:
    with pytest.raises(TypeError, match=meant):
        entropy_aware_kl(S, S, **{keyword: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [entropy_aware_kl, EntropyAwareKL.apply, reference.entropy_aware_kl])
def test_help_shows_every_keyword_with_its_default(function: Callable[..., Any]) -> None:
    (taken,) = (taken for known, taken in FUNCTIONS.values() if known == function)
    parameters = inspect.signature(function).parameters
    shown = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert shown == {name: DEFAULTS[name] for name in ALL if name in taken}  # type: ignore[literal-required]


def test_help_of_the_module_shows_what_it_remembers() -> None:
    assert set(inspect.signature(EntropyAwareKLLoss).parameters) == {"objective", *MODULE}
    module = EntropyAwareKLLoss(reduction="sum", workspace_bytes=7)
    assert {name: getattr(module, name) for name in MODULE} == {
        name: {"reduction": "sum", "workspace_bytes": 7}.get(name, DEFAULTS[name])  # type: ignore[literal-required]
        for name in MODULE
    }
