"""One call of the loss, forward and backward, by the schedule that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads.lm_head import LMHead
from ..inputs.record import Options, Tokens, Transform
from ..objective.gates import needs_student
from ..row_math.formulas import Coefficients
from ..row_math.statistics import times_or_zero
from ..rows import Logits, choose
from ..tensors import readable
from .chunked import visit_with_gradient
from .chunked_across_ranks import visit_across_ranks
from .first_visit import gate_of
from .fp16 import within_fp16
from .gates_first import visit_gates_first
from .gradient_filter import student_gradient
from .loss_terms import Own, scaled
from .problem import Problem
from .recompute import gradient_of, visit
from .seen import Seen
from .sides import HiddenSide, LogitsSide, Side, nothing_held
from .teacher_first import teacher_statistics
from .workspace import tiling

Gradients = tuple[Tensor | None, ...]  # of the student, its weight and its bias


class Solved(NamedTuple):
    """What forward leaves: the loss, what was seen of every token, and what backward needs beside the arguments.

    Args:
        kept: "chunked": what the gradients are still to be multiplied by, 0-d or ``[N]``, or None, then the gradients.
            "recompute": the tokens' weights, a, b, c ``[N]`` and the four tensors of :class:`Own`. Without a gradient
            nothing.
        options: those that ``kept`` was found with.
    """

    loss: Tensor
    seen: Seen
    kept: tuple[Tensor | None, ...]
    options: Options


def solve(
    tensors: Sequence[Tensor | None],
    token_weights: Tensor,
    denominator: Tensor | None,
    tokens: Tokens,
    options: Options,
) -> Solved:
    """The forward pass; ``tensors``: student, weight, bias, teacher, weight, bias."""
    student = tensors[0]
    assert student is not None
    needs_gradient = any(options.needs_gradient)
    problem, options, known = without_shut_rows(tensors, token_weights, tokens, options)
    kept: tuple[Tensor | None, ...] = ()
    if needs_gradient and options.schedule == "chunked":
        # The stored gradient is that of the mean already, so that a plain backward() has nothing left to do. In fp16
        # it is not: what is small times a weight over N would underflow before a scaler's factor reaches it.
        factors = problem.weights if denominator is None else problem.weights / denominator
        later = None
        if problem.student.gradient_dtype == torch.float16:
            factors, later = within_fp16(factors, per_row=isinstance(problem.student, LogitsSide))
        problem = replace(problem, weights=factors)
        gradient = student_gradient(
            tensors[:3], problem, problem.weights, options.needs_gradient, options.gradient_filter, options.inplace
        )
        visitor = visit_gates_first if problem.gates_first else visit_with_gradient
        seen = (visitor if problem.shard is None else visit_across_ranks)(problem, gradient)
        kept = (later, *gradient.tensors())
    else:
        seen, terms = visit(problem)
        if needs_gradient:
            own = (None,) * 4 if terms.own is None else terms.own
            kept = (problem.weights, *terms.coefficients, *own)
    seen = seen if known is None else completed(seen, *known)
    losses = times_or_zero(token_weights, seen.loss)
    if options.reduction == "none":
        loss = losses.view(student.shape[:-1])
    else:
        loss = losses.sum() if denominator is None else losses.sum() / denominator
    return Solved(loss, seen, kept, options)


def problem_of(tensors: Sequence[Tensor | None], weights: Tensor, tokens: Tokens, options: Options) -> Problem:
    """The call as the schedules see it; tokens of weight 0 count for nothing.

    On a CPU those of a hidden-state student are compacted away, so that they cost no products. Elsewhere that would
    have to wait for the device to count them; there they ride along with weight 0.
    """
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias = tensors
    assert student is not None
    valid = index = None
    if options.some_weigh_nothing and student_weight is not None:
        valid = weights != 0
        if readable(weights):
            index = valid.nonzero().squeeze(1)
            index, valid = (None if len(index) == len(valid) else index), None

    def side(tensor: Tensor, weight: Tensor | None, bias: Tensor | None, transform: Transform) -> Side:
        head = None
        if weight is not None:
            head = LMHead(weight, bias, scale=transform.scale, softcap=transform.softcap)
        if options.vocab_size == 0:
            return nothing_held(tensor, head, valid, options.autocast)
        if head is None:
            return LogitsSide(tensor, options.vocab_size)
        return HiddenSide(tensor, head, options.vocab_size, valid, options.autocast)

    of_student = side(student, student_weight, student_bias, options.student_transform)
    of_teacher = None
    if teacher is not None:
        of_teacher = side(teacher, teacher_weight, teacher_bias, options.teacher_transform)
    visited = len(weights) if index is None else len(index)
    shape = tiling(
        options.schedule,
        visited,
        of_student,
        of_teacher,
        gathered=index is not None,
        workspace_bytes=options.workspace_bytes,
        device=student.device,
        shard=options.shard,
    )
    width = max(options.vocab_size, 1)
    logits = Logits(width, of_student.dtype, (of_student if of_teacher is None else of_teacher).dtype)
    functions = choose(options.backend, student.device, logits)
    objective, shard = options.objective, options.shard
    return Problem(of_student, of_teacher, weights, index, objective, tokens, functions, shape, shard)


Known = tuple[Tensor, Tensor]  # statistics [N, 8] and gate [N]


def without_shut_rows(
    tensors: Sequence[Tensor | None], weights: Tensor, tokens: Tokens, options: Options
) -> tuple[Problem, Options, Known | None]:
    """The problem, the options to solve it with, and where the gates were found first, what is known of every token.

    Without a reverse half a token whose gate is shut has no gradient. On a CPU, and where the gate does not look at the
    student, the teacher goes first then, and the student's products see the open tokens only: in each chunk where that
    is possible (gates_first.py), else in a visit of all tokens, after which the teacher's product is repeated for the
    open ones: F·(D_t + s·(3·D_s + D_t)) flops for a share s of a vocabulary that is spread over ranks, and
    F·(D_t + s·(4·D_s + 2·D_t)) under "recompute". Elsewhere nothing is gained, because the number of open tokens would
    have to travel to the host.
    """
    objective = options.objective
    if not teacher_goes_first(tensors[1], tokens.gate, options, weights):
        return problem_of(tensors, weights, tokens, options), options, None
    everything = problem_of(tensors, weights, tokens, options)
    chunked = options.schedule == "chunked" and any(options.needs_gradient) and options.shard is None
    if chunked and tokens.gate is None and isinstance(everything.teacher, HiddenSide):
        return replace(everything, gates_first=True), options, None
    statistics = teacher_statistics(everything, look=tokens.gate is None)
    gate = gate_of(everything, statistics, tokens, weights)
    opened = torch.where(gate == 0, 0.0, weights)
    options = replace(options, some_weigh_nothing=True)
    if objective.hard_gate and tokens.gate is None:  # what is left is open, which the fused kernel can be told
        options = replace(options, objective=replace(objective, gate="always"))
    else:
        tokens = replace(tokens, gate=gate)
    return problem_of(tensors, opened, tokens, options), options, (statistics.packed, gate)


def teacher_goes_first(student_weight: Tensor | None, gate: Tensor | None, options: Options, like: Tensor) -> bool:
    """Whether the gates are found before the student is looked at: see :func:`without_shut_rows`."""
    objective = options.objective
    reverse, reverse_gate, _, _ = objective.combination
    looks_away = gate is not None or not needs_student(objective.gate)
    on_host = student_weight is not None and readable(like)
    return on_host and reverse == reverse_gate == 0 and looks_away and objective.gate != "always"


def completed(seen: Seen, packed: Tensor, gate: Tensor) -> Seen:
    """What is known of tokens that were not visited, put in: the teacher's statistics. The rest of theirs is NaN."""
    shut = (gate == 0).unsqueeze(1)
    return replace(seen, packed=torch.where(shut, packed, seen.packed), gate=gate)


def solve_again(
    tensors: Sequence[Tensor | None],
    upstream: Tensor,  # 0-d, or the leading shape
    denominator: Tensor | None,  # 0-d
    packed: Tensor,  # [N, 8]
    weights: Tensor,  # [N]
    coefficients: Coefficients,
    own: Own | None,
    options: Options,
) -> list[Tensor | None]:
    """The backward pass of the recompute schedule; ``tensors`` as in :func:`solve`."""
    factor = upstream if denominator is None else upstream / denominator
    problem = problem_of(tensors, weights, Tokens(), options)
    per_token, later = weights * factor.reshape(-1), None
    if problem.student.gradient_dtype == torch.float16 and isinstance(problem.student, HiddenSide):
        per_token, later = within_fp16(per_token, per_row=False)
    coefficients, own = scaled(coefficients, own, per_token)
    gradient = student_gradient(tensors[:3], problem, per_token, options.needs_gradient, options.gradient_filter)
    gradient_of(problem, packed, coefficients, own, gradient)
    return [g if g is None or later is None else g.mul_(later) for g in gradient.tensors()]


def as_inputs(gradients: Sequence[Tensor | None], forms: Sequence[tuple[torch.dtype, torch.Size]]) -> Gradients:
    """The accumulated gradients in the dtypes and shapes of the inputs."""
    pairs = zip(gradients, forms, strict=True)
    return tuple(None if g is None else g.to(form[0]).view(form[1]) for g, form in pairs)
