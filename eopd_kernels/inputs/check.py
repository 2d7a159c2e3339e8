"""The one check of a call: arguments as they came become a :class:`~eopd_kernels.inputs.record.Call`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..arguments import check_whole, described, one_of
from ..distributed.exchange import Exchange
from ..distributed.vocabulary import local_tensor, process_group
from ..heads.lm_head import local_head, tensors_of
from ..objective.objective import Objective
from ..rows import choose
from .agreement import among_ranks
from .keywords import PER_TOKEN, Keywords
from .options import (
    REDUCTIONS,
    check_gradient_filter,
    check_inplace,
    check_partial,
    check_wait_free,
    check_workspace,
    resolve_schedule,
)
from .per_token import (
    check_no_teacher,
    check_sparse_teacher,
    check_vocabulary,
    denominator,
    token_weights,
    tokens_of,
)
from .record import Call, Options
from .sides import check_side, check_vocab_size, common_vocabulary, needs_gradient, refuse_gradient
from .top_k_teacher import TopKTeacher

DEFAULT_OBJECTIVE = Objective()  # made once: a call of few tokens would notice


def checked(student: Tensor, teacher: Tensor | TopKTeacher | None, given: Keywords) -> Call:
    """Returns the call of these arguments, all keywords ``given``: see :func:`eopd_kernels.entropy_aware_kl`."""
    if given["tensor_parallel_group"] is None:
        return checked_here(student, teacher, given)
    # Dynamo cannot look into a process group, so that this is where the graph breaks.
    function = torch._dynamo.disable(checked_among_ranks) if torch.compiler.is_compiling() else checked_among_ranks
    return function(student, teacher, given)


def checked_among_ranks(student: Tensor, teacher: Tensor | TopKTeacher | None, given: Keywords) -> Call:
    """Checks a call under a ``tensor_parallel_group``: a rank that refuses it tells those that would wait for it."""
    group = process_group(given["tensor_parallel_group"])
    exchange = Exchange(group, student.device if isinstance(student, Tensor) else None)
    try:
        given = {
            **given,
            "student_head": local_head("student_head", given["student_head"], group),
            "teacher_head": local_head("teacher_head", given["teacher_head"], group),
        }
        if given["student_head"] is None:
            student = local_tensor("student", student, group, -1)
        if given["teacher_head"] is None:
            teacher = local_tensor("teacher", teacher, group, -1)
        return checked_here(student, teacher, given, exchange)
    except Exception:
        exchange.refuse()
        raise


def checked_here(
    student: Tensor, teacher: Tensor | TopKTeacher | None, given: Keywords, exchange: Exchange | None = None
) -> Call:
    """Checks a call of one process, or with an ``exchange`` that of one rank.

    What a rank may refuse alone comes before the exchange, what all refuse alike comes after it.
    """
    objective = DEFAULT_OBJECTIVE if given["objective"] is None else given["objective"]
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, got {described(objective)}")
    reduction, student_head, teacher_head = given["reduction"], given["student_head"], given["teacher_head"]
    one_of("reduction", reduction, REDUCTIONS)
    check_partial(given["partial_hidden_gradient"], exchange is not None, student_head)
    if exchange is not None and exchange.group.size() == 1:
        exchange = None  # everything is here
    least = 1 if exchange is None else 0
    check_side("student", student, student_head, least)
    served = dense = None
    if isinstance(teacher, TopKTeacher):
        check_sparse_teacher(served := teacher, teacher_head, objective, given["advantages"])
    elif teacher is None:
        check_no_teacher(teacher_head, objective, given)
    else:
        check_side("teacher", dense := teacher, teacher_head, least)
    if given["backend"] != "auto" and not torch.compiler.is_compiling():  # then it is asked for when the graph runs
        choose(given["backend"], student.device)  # refused before anything travels between ranks
    of_teacher = (student if teacher is None else teacher.ids if isinstance(teacher, TopKTeacher) else teacher).shape
    if student.shape[:-1] != of_teacher[:-1]:
        raise ValueError(
            "student and teacher must have the same leading shape, got "
            f"student {tuple(student.shape)} and teacher {tuple(of_teacher)}"
        )
    check_whole("ignore_index", given["ignore_index"])
    said: dict[str, Any] = {name: given[name] for name in PER_TOKEN}  # type: ignore[literal-required]
    if objective.cross_entropy != 0 and said["token_ids"] is None:
        said["token_ids"] = given["labels"]
    check_constants(student, dense, served, given, said)

    dtype = tensors.compute_dtype(student, dense, *tensors_of(student_head), *tensors_of(teacher_head))
    weights = token_weights(student, given["mask"], given["labels"], given["ignore_index"], dtype)
    schedule = resolve_schedule(given["schedule"], reduction, objective, given["gate"] is not None)
    check_vocab_size(vocab_size := given["vocab_size"])
    compared = 0
    if exchange is None:
        compared = common_vocabulary(student, student_head, dense, teacher_head, vocab_size)
    options = Options(
        objective=objective,
        reduction=reduction,
        schedule=schedule,
        inplace=check_inplace(given["inplace"], student, student_head, schedule),
        backend=given["backend"],
        local_vocab_size=compared,
        workspace_bytes=check_workspace(given["workspace_bytes"]),
        gradient_filter=check_gradient_filter(given["gradient_filter"], student_head),
        some_weigh_nothing=given["mask"] is not None or given["labels"] is not None,
        wait_free=check_wait_free(given["wait_free"], given["gradient_filter"]),
        needs_gradient=needs_gradient(student, student_head),
        autocast=tensors.autocast_dtype(student.device),
    )
    items = denominator(weights, given["num_items"], reduction, not options.some_weigh_nothing)
    tokens = tokens_of(said, served, objective, weights, student.shape[:-1])
    if teacher is None:
        unknown = torch.full_like(weights, torch.nan)
        tokens = replace(tokens, teacher_entropy=unknown, teacher_token_log_probs=unknown)
    call = Call(student, dense, student_head, teacher_head, weights, items, tokens, options)
    if exchange is not None:
        call = among_ranks(call, exchange, vocab_size, not given["partial_hidden_gradient"])
        assert call.options.shard is not None
        compared = call.options.shard.vocab_size
    check_vocabulary(tokens, objective, compared)
    if student_head is None and teacher_head is None:
        return call
    # Sharded heads are gathered after every check: a call that is refused sends nothing.
    return replace(
        call,
        student_head=student_head and student_head.gathered(),
        teacher_head=teacher_head and teacher_head.gathered(),
    )


def check_constants(
    student: Tensor, teacher: Tensor | None, served: TopKTeacher | None, given: Keywords, said: dict[str, Any]
) -> None:
    """Refuses tensors on another device than the student's, and tensors that require a gradient which never comes."""
    heads = {"student_head": tensors_of(given["student_head"]), "teacher_head": tensors_of(given["teacher_head"])}
    named: dict[str, Any] = {
        "teacher": teacher,
        **{f"teacher.{name}": tensor for name, tensor in ({} if served is None else served.tensors).items()},
        **{f"{name}.weight": weight for name, (weight, _) in heads.items()},
        **{f"{name}.bias": bias for name, (_, bias) in heads.items()},
        "mask": given["mask"],
        "labels": given["labels"],
        **said,
    }
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.device != student.device:
            raise ValueError(
                f"all tensors must be on one device, got student on {student.device} and {name} on {tensor.device}"
            )
    if torch.is_grad_enabled():
        for name, tensor in {**named, "num_items": given["num_items"]}.items():
            if isinstance(tensor, Tensor) and not name.startswith("student"):
                refuse_gradient(name, tensor)
