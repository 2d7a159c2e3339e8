"""Every check of the arguments of the loss, in one place, and what is derived from them before a schedule starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import devices, memory, parallel
from .arguments import check_floating, check_whole, described, finite, quoted
from .exchange import Exchange
from .gates import EntropyGate, QuantileGate, needs_every_row
from .head import LMHead, compute_dtype, tensors_of
from .objective import Objective
from .rows import choose
from .schedules import SCHEDULES
from .sharded import check_not_partitioned, is_dtensor
from .sides import uniform_rows
from .sparse_teacher import TopKTeacher
from .token_inputs import check_sparse_teacher, check_vocabulary, denominator, token_weights, tokens_of
from .tokens import Tokens

REDUCTIONS = ("mean", "sum", "none")


class Transform(NamedTuple):
    """What a head does to its logits."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Options:
    """The options of one call, checked.

    Args:
        objective, reduction, schedule, inplace, backend: as in :func:`eopd_kernels.entropy_aware_kl`, ``schedule``
            resolved.
        vocab_size: the entries of the vocabulary that are compared here.
        workspace_bytes: the budget for blocks of logits, or None for the default.
        gradient_filter: ε, or None for exact products.
        student_transform, teacher_transform: scale and softcap of each head.
        some_weigh_nothing: whether there may be tokens of weight 0.
        needs_gradient: whether autograd will ask for the gradient of student, student weight, student bias.
        autocast: the dtype of torch.autocast where the loss was called, or None.
        shard: this rank's part of a vocabulary that is spread over ranks, or None.
    """

    objective: Objective
    reduction: str
    schedule: str
    inplace: bool
    backend: str
    vocab_size: int
    workspace_bytes: int | None
    gradient_filter: float | None
    student_transform: Transform
    teacher_transform: Transform
    some_weigh_nothing: bool
    needs_gradient: tuple[bool, bool, bool]
    autocast: torch.dtype | None
    shard: parallel.Shard | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """Everything one call needs: its tensors and its options."""

    student: Tensor
    teacher: Tensor | None  # None: a TopKTeacher, whose entries are in tokens
    student_head: LMHead | None
    teacher_head: LMHead | None
    weights: Tensor  # [N], 0 where masked
    denominator: Tensor | None  # 0-d; None for "sum" and "none"
    tokens: Tokens
    options: Options

    @property
    def leading(self) -> torch.Size:
        """The leading shape, that of the per-token outputs."""
        return self.student.shape[:-1]


def checked(
    student: Tensor, teacher: Tensor | TopKTeacher, *, tensor_parallel_group: Any = None, **options: Any
) -> Call:
    """Checks the arguments of :func:`eopd_kernels.entropy_aware_kl` (see there) and gives each its default."""
    if tensor_parallel_group is None:
        return checked_here(student, teacher, None, **options)
    # Dynamo cannot look into a process group, so that this is where the graph breaks.
    function = torch._dynamo.disable(checked_among_ranks) if torch.compiler.is_compiling() else checked_among_ranks
    return function(student, teacher, tensor_parallel_group, options)


def checked_among_ranks(student: Tensor, teacher: Tensor | TopKTeacher, group: Any, options: dict[str, Any]) -> Call:
    """The same under a ``tensor_parallel_group``: a rank that refuses the call tells those that would wait for it."""
    group = parallel.process_group(group)
    exchange = Exchange(group, student.device if isinstance(student, Tensor) else None)
    try:
        return checked_here(student, teacher, exchange, **options)
    except Exception:
        exchange.refuse()
        raise


def checked_here(
    student: Tensor,
    teacher: Tensor | TopKTeacher,
    exchange: Exchange | None,
    *,
    student_head: LMHead | None = None,
    teacher_head: LMHead | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    objective: Objective | None = None,
    token_ids: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    gate: Tensor | None = None,
    reverse_weights: Tensor | None = None,
    forward_weights: Tensor | None = None,
    reduction: str = "mean",
    schedule: str = "auto",
    backend: str = "auto",
    inplace: bool = False,
    workspace_bytes: int | None = None,
    gradient_filter: float | None = None,
    partial_hidden_gradient: bool = False,
) -> Call:
    """The checks themselves. Ranks meet in ``exchange``: what one of them may refuse alone comes before it, what all
    refuse alike after it."""
    objective = Objective() if objective is None else objective
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, got {described(objective)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {quoted(reduction)}")
    group = None if exchange is None else exchange.group
    if group is not None:
        student = student if student_head is not None else parallel.local_tensor("student", student, group, -1)
        teacher = teacher if teacher_head is not None else parallel.local_tensor("teacher", teacher, group, -1)
        student_head = parallel.local_head("student_head", student_head, group)
        teacher_head = parallel.local_head("teacher_head", teacher_head, group)
    check_partial(partial_hidden_gradient, group is not None, student_head)
    if group is not None and group.size() == 1:
        exchange = None  # everything is here
    least = 1 if exchange is None else 0
    check_side("student", student, student_head, least)
    sparse = dense = None
    if isinstance(teacher, TopKTeacher):
        check_sparse_teacher(sparse := teacher, teacher_head, objective)
    else:
        check_side("teacher", dense := teacher, teacher_head, least)
    if backend != "auto" and not torch.compiler.is_compiling():  # then it is asked for when the graph runs
        choose(backend, student.device)  # refused before anything travels between ranks
    of_teacher = teacher.ids.shape if isinstance(teacher, TopKTeacher) else teacher.shape
    if student.shape[:-1] != of_teacher[:-1]:
        raise ValueError(
            "student and teacher must have the same leading shape, got "
            f"student {tuple(student.shape)} and teacher {tuple(of_teacher)}"
        )
    student_weight, student_bias = tensors_of(student_head)
    teacher_weight, teacher_bias = tensors_of(teacher_head)
    check_whole("ignore_index", ignore_index)
    per_token = {
        "token_ids": token_ids,
        "old_log_probs": old_log_probs,
        "gate": gate,
        "reverse_weights": reverse_weights,
        "forward_weights": forward_weights,
    }
    named: dict[str, Any] = {
        "teacher": dense,
        **{f"teacher.{name}": tensor for name, tensor in ({} if sparse is None else sparse.tensors).items()},
        "student_head.weight": student_weight,
        "student_head.bias": student_bias,
        "teacher_head.weight": teacher_weight,
        "teacher_head.bias": teacher_bias,
        "mask": mask,
        "labels": labels,
        **per_token,
    }
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.device != student.device:
            raise ValueError(
                f"all tensors must be on one device, got student on {student.device} and {name} on {tensor.device}"
            )
    if torch.is_grad_enabled():
        for name, tensor in {**named, "num_items": num_items}.items():
            if isinstance(tensor, Tensor) and not name.startswith("student"):
                refuse_gradient(name, tensor)

    dtype = compute_dtype(student, dense, student_weight, student_bias, teacher_weight, teacher_bias)
    weights = token_weights(student, mask, labels, ignore_index, dtype)
    teacher_width = None if dense is None else width(dense, teacher_head)
    schedule = resolve_schedule(schedule, reduction, objective, gate is not None)
    wanted = needs_gradient(student, student_head)
    items = denominator(weights, num_items, reduction)
    tokens = tokens_of(per_token, sparse, objective, weights, student.shape[:-1])
    inplace = check_inplace(inplace, student, student_head, schedule)
    workspace_bytes = check_workspace(workspace_bytes)
    gradient_filter = check_gradient_filter(gradient_filter, student_head)
    autocast = devices.autocast_dtype(student.device)
    shard = None
    if exchange is None:
        heads = {"student": student_head, "teacher": teacher_head}
        without_head = [side for side, head in heads.items() if head is None and teacher_width is not None]
        compared = here = common_vocabulary(width(student, student_head), teacher_width, vocab_size, without_head)
    else:
        check_vocab_size(vocab_size)
        said = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
        logits = [s for s, h in ((student, student_head), (dense, teacher_head)) if s is not None and h is None]
        known_gate = isinstance(objective.gate, (str, EntropyGate, QuantileGate))
        alike = {  # but for the backend, which no other rank notices
            "leading": tuple(student.shape[:-1]),
            "rows of one stride": [uniform_rows(s)[1] for s in logits],
            "dtypes": [str(t.dtype) for t in (student, dense, student_weight, teacher_weight) if t is not None],
            "heads": [
                h and (h.weight.shape[1], h.bias is not None, transform(h)) for h in (student_head, teacher_head)
            ],
            "said of the tokens": {name: tuple(t.shape[1:]) for name, t in said.items() if t is not None},
            "objective": replace(objective, gate="always"),
            "gate": objective.gate if known_gate else getattr(objective.gate, "__qualname__", "a callable"),
            "reduction": reduction,
            "schedule": schedule,
            "differentiated": [any(wanted), student_head is not None and wanted[0]],
            "partial_hidden_gradient": partial_hidden_gradient,
            "gradient_filter": gradient_filter,
            "inplace": inplace,
            "workspace_bytes": workspace_bytes,
            "autocast": autocast,
        }
        shard = parallel.shard_of(
            exchange,
            width(student, student_head),
            teacher_width,
            vocab_size,
            alike,
            [weights, items, *said.values()],
            not partial_hidden_gradient,
        )
        compared, here = shard.vocab_size, shard.size
    check_vocabulary(tokens, objective, compared)
    options = Options(
        objective,
        reduction,
        schedule,
        inplace,
        backend,
        here,
        workspace_bytes,
        gradient_filter,
        transform(student_head),
        transform(teacher_head),
        mask is not None or labels is not None,
        wanted,
        autocast,
        shard,
    )
    # Sharded heads are gathered after every check: a call that is refused sends nothing.
    student_head, teacher_head = student_head and student_head.gathered(), teacher_head and teacher_head.gathered()
    return Call(student, dense, student_head, teacher_head, weights, items, tokens, options)


def check_partial(partial: bool, parallel: bool, head: LMHead | None) -> None:
    if not isinstance(partial, bool):
        raise TypeError(f"partial_hidden_gradient must be a bool, got {described(partial)}")
    if partial and not (parallel and head is not None):
        raise ValueError(
            "partial_hidden_gradient=True is for hidden states with a student_head under a tensor_parallel_group, got "
            f"student_head={head!r}" + ("" if parallel else " and no group")
        )


def check_side(name: str, tensor: Tensor, head: LMHead | None, least: int = 1) -> None:
    """Logits ``[..., V]`` or, with a head, hidden states ``[..., D]``; V is ``least`` or more."""
    check_floating(
        name,
        tensor,
        f"pass its logits, or hidden states such as its hidden_states[-1] with {name}_head=LMHead.from_model(model)",
    )
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} must be an ordinary tensor with this rank's tokens, got a DTensor: pass {name}.to_local(), or "
            f"{name}.full_tensor() where it is not sharded by tokens"
        )
    if head is not None and not isinstance(head, LMHead):
        raise TypeError(
            f"{name}_head must be an LMHead or None, got {described(head)}: pass LMHead.from_model(model), "
            "or LMHead(weight) of a weight [V, D]"
        )
    if tensor.dim() < 1 or tensor.shape[-1] < (least if head is None else 1):
        last = "V" if head is None else "D"
        raise ValueError(f"{name} must have the shape [..., {last}] with {last} >= 1, got {tuple(tensor.shape)}")
    if head is not None:
        check_not_partitioned(f"{name}_head.weight", head.weight)
        if len(head.weight) < least:
            raise ValueError(
                f"{name}_head.weight must have the shape [V, D] with V >= 1, got {tuple(head.weight.shape)}"
            )
    if head is not None and tensor.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} hidden states must end in D = {head.weight.shape[1]} as {name}_head.weight "
            f"{tuple(head.weight.shape)} does, got {tuple(tensor.shape)}"
        )


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """Refuses a gradient that would never come: all but the student and its head are constants of the loss."""
    if not tensor.requires_grad:
        return
    of_teacher, remedy = name.startswith("teacher"), "pass it detached"
    if name.startswith("teacher_head"):
        remedy = "call teacher.requires_grad_(False) once, or pass it detached"
    elif of_teacher:
        remedy = "run the teacher under torch.no_grad(), or pass it detached"
    respect = "the teacher" if of_teacher else f"{name}"
    raise ValueError(f"{name} requires grad, but the loss is never differentiated with respect to {respect}: {remedy}")


def transform(head: LMHead | None) -> Transform:
    return Transform() if head is None else Transform(head.scale, head.softcap)


def width(tensor: Tensor, head: LMHead | None) -> int:
    """V of a side."""
    return tensor.shape[-1] if head is None else head.weight.shape[0]


def common_vocabulary(
    student: int, teacher: int | None, vocab_size: int | None, without_head: Sequence[str] = ()
) -> int:
    """The number of leading vocabulary entries that are compared; a teacher without logits has the student's.

    Args:
        without_head: the sides that were taken for logits because no head came with them.
    """
    teacher = student if teacher is None else teacher
    if vocab_size is None:
        if student != teacher:
            taken = "".join(
                f"{side} was taken for logits, as it came without {side}_head: if it is hidden states, pass that; "
                for side in without_head
            )
            raise ValueError(
                f"student and teacher have vocabularies of {student} and {teacher}; {taken}where the entries up to "
                "some size mean the same tokens in both, pass that size as vocab_size"
            )
        return student
    check_vocab_size(vocab_size)
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be between 1 and the smaller vocabulary (student {student}, teacher {teacher}), "
            f"got {vocab_size}"
        )
    return vocab_size


def check_vocab_size(vocab_size: int | None) -> None:
    """What can be said of it before the vocabularies are known."""
    if vocab_size is not None:
        check_whole("vocab_size", vocab_size, "an int or None")


def resolve_schedule(schedule: str, reduction: str, objective: Objective, gate_given: bool) -> str:
    """ "auto": chunked where the upstream gradient is one number and a gate looks at its own row, else recompute."""
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
    """Whether the gradient may take the memory of the student's logits, where that is asked for."""
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
    if (student.shape[-1] > 1 and student.stride(-1) != 1) or memory.overlaps_itself(student):
        raise ValueError(
            f"inplace=True needs student rows that are dense and apart in memory, got strides {student.stride()}"
        )
    return True


def check_apart(student: Tensor, teacher: Tensor | None) -> None:
    """Refuses an in-place gradient that would overwrite the teacher's logits before they are read."""
    if teacher is not None and memory.share_memory(student, teacher):
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


def check_gradient_filter(gradient_filter: float | None, head: LMHead | None) -> float | None:
    if gradient_filter is None:
        return None
    if head is None:
        raise ValueError(
            "gradient_filter leaves columns out of the products with the student_head, got a student that is logits"
        )
    return finite("gradient_filter", gradient_filter, above=0.0, most=1.0)


def needs_gradient(student: Tensor, head: LMHead | None) -> tuple[bool, bool, bool]:
    """What autograd will ask for. Asked here because autograd.Function.forward always runs without gradients."""
    enabled = torch.is_grad_enabled()
    weight, bias = (enabled and t is not None and t.requires_grad for t in tensors_of(head))
    return enabled and student.requires_grad, weight, bias
