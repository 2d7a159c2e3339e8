"""Keywords of the loss: their names, types and defaults, one list for every function that takes them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from torch import Tensor

from ..heads.lm_head import LMHead
from ..objective.objective import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class TensorKeywords(TypedDict, total=False):
    """What comes with each call: heads, and what is said of each token."""

    student_head: LMHead | None
    teacher_head: LMHead | None
    mask: Tensor | None
    labels: Tensor | None
    num_items: int | float | Tensor | None
    token_ids: Tensor | None
    old_log_probs: Tensor | None
    advantages: Tensor | None
    gate: Tensor | None
    reverse_weights: Tensor | None
    forward_weights: Tensor | None


class ObjectiveKeyword(TypedDict, total=False):
    """The objective: what is minimised."""

    objective: Objective | None


class LossKeywords(TypedDict, total=False):
    """What is made of the tokens' losses."""

    reduction: str
    ignore_index: int
    vocab_size: int | None


class ScheduleKeywords(TypedDict, total=False):
    """How the loss is computed: its value stays the same up to rounding, and so do exact gradients."""

    schedule: str
    backend: str
    inplace: bool
    workspace_bytes: int | None
    gradient_filter: float | None
    wait_free: bool
    tensor_parallel_group: ProcessGroup | DeviceMesh | None
    partial_hidden_gradient: bool


class ModuleKeywords(LossKeywords, ScheduleKeywords, total=False):
    """What an :class:`eopd_kernels.EntropyAwareKLLoss` remembers beside its objective."""


class ReferenceKeywords(TensorKeywords, ObjectiveKeyword, LossKeywords, total=False):
    """What :mod:`eopd_kernels.reference` takes: it has one way of computing things."""


class Keywords(TensorKeywords, ObjectiveKeyword, LossKeywords, ScheduleKeywords, total=False):
    """All keywords, as :func:`eopd_kernels.entropy_aware_kl` explains them."""


# None where nothing is said here.
DEFAULTS = cast(
    Keywords,
    dict.fromkeys(Keywords.__annotations__)
    | {
        "reduction": "mean",
        "ignore_index": -100,
        "schedule": "auto",
        "backend": "auto",
        "inplace": False,
        "wait_free": False,
        "partial_hidden_gradient": False,
    },
)
TENSORS, MODULE, REFERENCE, ALL = (
    tuple(name for name in DEFAULTS if name in kind.__annotations__)
    for kind in (TensorKeywords, ModuleKeywords, ReferenceKeywords, Keywords)
)
PER_TOKEN = ("token_ids", "old_log_probs", "advantages", "gate", "reverse_weights", "forward_weights")


def with_defaults(function: str, given: Mapping[str, Any], allowed: tuple[str, ...] = ALL) -> Keywords:
    """Returns the keywords given, and the defaults of the others.

    Args:
        function: the name of the function that was called, for the error.

    Raises:
        TypeError: a keyword is not among those ``allowed``.
    """
    for name in given:
        if name not in allowed:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint(name, allowed)}")
    return cast(Keywords, {**DEFAULTS, **given})


def hint(name: str, allowed: Iterable[str]) -> str:
    """Guesses what was meant by an unknown keyword."""
    if name in {field.name for field in fields(Objective)}:
        return f": it is an option of the objective, objective=Objective({name}=...)"
    if name in ("tau", "threshold", "entropy_threshold"):
        return ": the gate's threshold is objective=Objective(gate=EntropyGate(...))"
    close = difflib.get_close_matches(name, list(allowed), 1)
    return f": {close[0]!r} is one" if close else f", takes {', '.join(allowed)}"


Function = TypeVar("Function", bound=Callable[..., Any])


def shown_with(allowed: tuple[str, ...]) -> Callable[[Function], Function]:
    """Makes ``help`` and ``inspect.signature`` of a function show the keywords that its ``**keywords`` stand for."""
    types: dict[str, Any] = Keywords.__annotations__

    def decorated(function: Function) -> Function:
        signature = inspect.signature(function)
        before = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=DEFAULTS[name],  # type: ignore[literal-required]
                annotation=getattr(types[name], "__forward_arg__", types[name]),
            )
            for name in allowed
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*before, *named])  # type: ignore[attr-defined]
        return function

    return decorated
