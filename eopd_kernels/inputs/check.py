"""Every check of the arguments of the loss, in one place, and what is derived from them before a schedule starts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..arguments import check_whole, described, quoted
from ..distributed import vocabulary
from ..distributed.exchange import Exchange
from ..heads.lm_head import LMHead, local_head, tensors_of
from ..objective.gates import EntropyGate, QuantileGate
from ..objective.objective import Objective
from ..rows import choose
from ..tensors import compute_dtype, uniform_rows
from .options import REDUCTIONS, check_gradient_filter, check_inplace, check_partial, check_workspace, resolve_schedule
from .per_token import check_sparse_teacher, check_vocabulary, denominator, token_weights, tokens_of
from .record import Call, Options
from .sides import check_side, check_vocab_size, common_vocabulary, needs_gradient, refuse_gradient, transform, width
from .top_k_teacher import TopKTeacher


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
    group = vocabulary.process_group(group)
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
        student = student if student_head is not None else vocabulary.local_tensor("student", student, group, -1)
        teacher = teacher if teacher_head is not None else vocabulary.local_tensor("teacher", teacher, group, -1)
        student_head = local_head("student_head", student_head, group)
        teacher_head = local_head("teacher_head", teacher_head, group)
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
    autocast = tensors.autocast_dtype(student.device)
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
        shard = vocabulary.shard_of(
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
