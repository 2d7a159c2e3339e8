"""One call of the loss, forward and backward, by the schedule that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kept_memory
from ..heads.lm_head import LMHead
from ..inputs.record import Call
from ..objective.gates import needs_student
from ..row_math.formulas import Coefficients
from ..row_math.statistics import RowStatistics, times_or_zero
from ..rows import Logits, choose
from ..second_derivative import Gradients
from ..tensors import gradient_dtype, readable
from .chunked import chunked_forward
from .chunked_across_ranks import chunked_forward_across_ranks
from .first_visit import gate_of
from .fp16 import within_fp16
from .gates_first import gates_first_forward
from .gradient_filter import FilteredGradient
from .loss_terms import Own, RowGradient
from .masked import Visited, visited
from .problem import Problem
from .recompute import recompute_backward, recompute_forward
from .seen import Seen
from .sides import HiddenSide, LogitsSide, Side, nothing_held
from .student_gradient import HiddenGradient, LogitsGradient, NothingHeld, StudentGradient
from .teacher_first import teacher_statistics
from .workspace import tiling


class Solved(NamedTuple):
    """What forward leaves: the loss, what was seen of every token, and what backward needs beside the call.

    Args:
        kept: "chunked": what the gradients are still to be multiplied by, 0-d or ``[N]``, or None, then the gradients.
            "recompute": the tokens' weights, a, b, c ``[N]`` and the four tensors of :class:`Own`. Without a gradient
            nothing.
        visited: the tokens that were, for backward under "recompute".
    """

    loss: Tensor
    seen: Seen
    kept: tuple[Tensor | None, ...]
    visited: Visited


def solve(call: Call) -> Solved:
    """Runs the forward pass, and under "chunked" takes the gradients."""
    options, denominator = call.options, call.denominator
    needs_gradient = any(options.needs_gradient)
    problem, known = planned(call)
    kept: tuple[Tensor | None, ...] = ()
    if needs_gradient and options.schedule == "chunked":
        # The stored gradient is that of the mean already, so that a plain backward() has nothing left to do. In fp16
        # it is not: what is small times a weight over N would underflow before a scaler's factor reaches it.
        factors = problem.weights if denominator is None else problem.weights / denominator
        later = None
        if problem.student.gradient_dtype == torch.float16:
            factors, later = within_fp16(factors, per_row=isinstance(problem.student, LogitsSide))
        problem.weights = factors
        gradient = student_gradient(call, problem, factors)
        visitor = gates_first_forward if problem.gates_first else chunked_forward
        seen = (visitor if problem.shard is None else chunked_forward_across_ranks)(problem, gradient)
        kept = (later, *gradient.tensors())
    else:
        seen, terms = recompute_forward(problem)
        if needs_gradient:
            own = (None,) * 4 if terms.own is None else terms.own
            kept = (problem.weights, *terms.coefficients, *own)
    seen = seen if known is None else completed(seen, *known)
    losses = seen.loss
    if options.some_weigh_nothing or options.reduction == "none":
        losses = times_or_zero(call.weights, losses)
    if options.reduction == "none":
        loss = losses.view(call.leading)
    else:
        loss = losses.sum() if denominator is None else losses.sum() / denominator
    return Solved(loss, seen, kept, Visited(problem.index, None))


def solve_again(
    call: Call, upstream: Tensor, packed: Tensor, kept: Sequence[Any], before: Visited | None = None
) -> list[Tensor | None]:
    """Runs the backward pass of the recompute schedule: visits every block once more.

    Args:
        upstream: the incoming gradient, 0-d or of the leading shape.
        packed: ``[N, 8]`` the statistics that forward saw.
        kept: what forward kept, see :class:`Solved`.
        before: the tokens that forward visited, likewise; None where that is not known.
    """
    weights, a, b, c, *of_own = kept
    factor = upstream if call.denominator is None else upstream / call.denominator
    problem = problem_of(call, weights, before)
    per_token, later = weights * factor.reshape(-1), None
    if problem.student.gradient_dtype == torch.float16 and isinstance(problem.student, HiddenSide):
        per_token, later = within_fp16(per_token, per_row=False)
    own = Own(*of_own) if of_own and of_own[0] is not None else None
    gradient = student_gradient(call, problem, per_token)
    recompute_backward(problem, RowGradient(packed, Coefficients(a, b, c), own).times(per_token), gradient)
    return [g if g is None or later is None else g.mul_(later) for g in gradient.tensors()]


def as_inputs(gradients: Sequence[Tensor | None], forms: Sequence[tuple[torch.dtype, torch.Size] | None]) -> Gradients:
    """Returns the accumulated gradients in the dtypes that are asked for, and in the shapes of the inputs."""
    pairs = zip(gradients, forms, strict=True)
    return tuple(None if g is None or form is None else kept_memory.cast(g, form[0]).view(form[1]) for g, form in pairs)


def problem_of(call: Call, weights: Tensor, before: Visited | None = None) -> Problem:
    """Returns the call as the schedules see it; tokens of weight 0 count for nothing.

    Args:
        before: the tokens that forward visited, in backward.
    """
    options, size = call.options, call.options.local_vocab_size
    index, valid = visited(call, weights, before)

    def side(tensor: Tensor, head: LMHead | None) -> Side:
        if size == 0:
            return nothing_held(tensor, head, valid, options.autocast)
        return LogitsSide(tensor, size) if head is None else HiddenSide(tensor, head, size, valid, options.autocast)

    student = side(call.student, call.student_head)
    teacher = None if call.teacher is None else side(call.teacher, call.teacher_head)
    shape = tiling(
        schedule=options.schedule,
        n=len(weights) if index is None else len(index),
        student=student,
        teacher=teacher,
        gathered=index is not None,
        workspace_bytes=options.workspace_bytes,
        device=call.student.device,
        shard=options.shard,
    )
    logits = Logits(max(size, 1), student.dtype, (student if teacher is None else teacher).dtype)
    return Problem(
        student=student,
        teacher=teacher,
        weights=weights,
        index=index,
        objective=options.objective,
        tokens=call.tokens,
        functions=choose(options.backend, call.student.device, logits),
        tiling=shape,
        shard=options.shard,
    )


def student_gradient(call: Call, problem: Problem, weights: Tensor) -> StudentGradient:
    """Returns the object that takes up the gradient of this kind of student.

    Args:
        weights: ``[N]`` what the gradient of each token's loss is multiplied by.
    """
    side, shard, needs = problem.student, problem.shard, call.options.needs_gradient
    if shard is not None and shard.size == 0:
        only_hidden = (needs[0], False, False)
        of_entry = HiddenGradient(side, only_hidden, problem.block, shard) if isinstance(side, HiddenSide) else None
        return NothingHeld(call.differentiable(), needs, of_entry)
    if isinstance(side, LogitsSide):
        return LogitsGradient(call.student, side, call.options.inplace)
    assert isinstance(side, HiddenSide)
    epsilon = call.options.gradient_filter
    if epsilon is None or len(weights) == 0:
        assert call.student_head is not None
        # Each entry of dW is then written once: bf16, which has fp32's range, loses nothing that was asked for.
        rounded = problem.one_chunk and gradient_dtype(call.student_head.weight) == torch.bfloat16
        return HiddenGradient(side, needs, problem.block, shard, rounded)
    return FilteredGradient(side, needs, problem.block, epsilon * weights.abs().max(), shard)


Known = tuple[RowStatistics, Tensor]  # of all N tokens, and their gate


def planned(call: Call) -> tuple[Problem, Known | None]:
    """Returns the problem to solve, and where the gates were found first, what is known of every token.

    Without a reverse half a token whose gate is shut has no gradient. On a CPU, and where the gate does not look at the
    student, the teacher goes first then, and the student's products see the open tokens only: in each chunk where that
    is possible (gates_first.py), else in a visit of all tokens, after which the teacher's product is repeated for the
    open ones: F·(D_t + s·(3·D_s + D_t)) flops for a share s of a vocabulary that is spread over ranks, and
    F·(D_t + s·(4·D_s + 2·D_t)) under "recompute". Elsewhere nothing is gained, because the number of open tokens would
    have to travel to the host.
    """
    everything = problem_of(call, call.weights)
    if not teacher_goes_first(call):
        return everything, None
    options, tokens = call.options, call.tokens
    chunked = options.schedule == "chunked" and any(options.needs_gradient) and options.shard is None
    if chunked and tokens.gate is None and isinstance(everything.teacher, HiddenSide):
        return replace(everything, gates_first=True), None
    statistics = teacher_statistics(everything, look=tokens.gate is None)
    gate = gate_of(everything, statistics, tokens, call.weights)
    problem = problem_of(call, torch.where(gate == 0, 0.0, call.weights))
    return problem.of_open_tokens(gate), (statistics, gate)


def teacher_goes_first(call: Call) -> bool:
    """Returns whether the gates are found before the student is looked at: see :func:`planned`."""
    objective = call.options.objective
    reverse, reverse_gate, _, _ = objective.combination
    looks_away = call.tokens.gate is not None or not needs_student(objective.gate)
    on_host = call.student_head is not None and readable(call.weights)
    of_open_only = reverse == reverse_gate == objective.cross_entropy == 0
    return on_host and of_open_only and looks_away and objective.gate != "always"


def completed(seen: Seen, statistics: RowStatistics, gate: Tensor) -> Seen:
    """Fills in the teacher's statistics of tokens that were not visited; their other figures are NaN."""
    shut, token = (gate == 0).unsqueeze(1), seen.token_log_probs
    if token is not None and statistics.token_log_probs is not None:
        token = torch.where(shut, statistics.token_log_probs, token)
    packed = torch.where(shut, statistics.packed, seen.packed)
    return replace(seen, packed=packed, gate=gate, token_log_probs=token)
