"""Checks of the options that say how the loss is computed."""

from __future__ import annotations

from torch import Tensor

from .. import tensors
from ..arguments import check_whole, described, finite, quoted
from ..heads.lm_head import LMHead
from ..objective.gates import needs_every_row
from ..objective.objective import Objective

REDUCTIONS = ("mean", "sum", "none")
SCHEDULES = ("chunked", "recompute")


def check_partial(partial: bool, parallel: bool, head: LMHead | None) -> None:
    if not isinstance(partial, bool):
        raise TypeError(f"partial_hidden_gradient must be a bool, got {described(partial)}")
    if partial and not (parallel and head is not None):
        raise ValueError(
            "partial_hidden_gradient=True is for hidden states with a student_head under a tensor_parallel_group, got "
            f"student_head={head!r}" + ("" if parallel else " and no group")
        )


def resolve_schedule(schedule: str, reduction: str, objective: Objective, gate_given: bool) -> str:
    """Returns the schedule that "auto" stands for: chunked where the upstream gradient is one number and each gate
    looks at its own row, else recompute."""
    if schedule not in ("auto", *SCHEDULES):
        raise ValueError(f"schedule must be 'auto' or one of {SCHEDULES}, got {quoted(schedule)}")
    waits_for_rows = needs_every_row(objective.gate) and not gate_given
    if reduction != "none" and not waits_for_rows:
        return "chunked" if schedule == "auto" else schedule
    if schedule == "chunked":
        if reduction == "none":
            reason = "before the upstream gradient of each token is known: with reduction='none'"
        else:
            reason = f"before every token's statistics are known: with the gate {objective.gate!r}"
        raise ValueError(f"schedule='chunked' takes the gradient {reason} use schedule='recompute' (or 'auto')")
    return "recompute"


def check_inplace(inplace: bool, student: Tensor, head: LMHead | None, schedule: str) -> bool:
    """Returns whether the gradient takes the memory of the student's logits; refuses where it cannot."""
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be a bool, got {described(inplace)}")
    if not inplace:
        return False
    if head is not None:
        raise ValueError("inplace=True is for a student that is logits, got hidden states with a student_head")
    if schedule != "chunked":
        raise ValueError(
            f"inplace=True needs schedule='chunked', which reads each logit before it is gone, got {schedule!r}"
        )
    if student.is_leaf and student.requires_grad:
        raise ValueError(
            "inplace=True would overwrite student, a leaf tensor that requires grad; pass a model's output"
        )
    if (student.shape[-1] > 1 and student.stride(-1) != 1) or tensors.overlaps_itself(student):
        raise ValueError(
            f"inplace=True needs student rows that are dense and apart in memory, got strides {student.stride()}"
        )
    return True


def check_apart(student: Tensor, teacher: Tensor | None) -> None:
    """Refuses an in-place gradient that would overwrite the teacher's logits before they are read."""
    if teacher is not None and tensors.share_memory(student, teacher):
        raise ValueError(
            "inplace=True needs a student and a teacher apart in memory, got two views of one tensor that meet: "
            "pass a copy of one of them"
        )


def check_workspace(workspace_bytes: int | None) -> int | None:
    if workspace_bytes is None:
        return None
    check_whole("workspace_bytes", workspace_bytes, "an int or None")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")
    return workspace_bytes


def check_wait_free(wait_free: bool, gradient_filter: float | None) -> bool:
    if not isinstance(wait_free, bool):
        raise TypeError(f"wait_free must be a bool, got {described(wait_free)}")
    if wait_free and gradient_filter is not None:
        raise ValueError("wait_free=True cannot be had with a gradient_filter, which asks how many columns it leaves")
    return wait_free


def check_gradient_filter(gradient_filter: float | None, head: LMHead | None) -> float | None:
    if gradient_filter is None:
        return None
    if head is None:
        raise ValueError(
            "gradient_filter leaves columns out of the products with the student_head, got a student that is logits"
        )
    return finite("gradient_filter", gradient_filter, above=0.0, most=1.0)
