"""EntropyAwareKL: the torch.autograd.Function behind every door of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import devices
from .across import visit_across_ranks
from .figures import gate_of
from .fp16 import outstanding, within_fp16
from .gates import needs_student
from .gates_first import visit_gates_first
from .head import LMHead, tensors_of
from .inputs import Call, Options, Transform, check_apart, checked
from .objective import Coefficients
from .problem import Problem
from .rows import Logits, choose
from .schedules import Seen, gradient_of, student_gradient, teacher_statistics, tiling, visit, visit_with_gradient
from .sides import HiddenSide, LogitsSide, Side, nothing_held
from .sparse_teacher import TopKTeacher
from .statistics import weighted
from .terms import Own, scaled
from .tokens import Tokens


class Inlined(type(torch.autograd.Function)):  # type: ignore[misc]
    """The type of an autograd.Function whose ``apply`` torch.compile traces: of any other it traces ``forward``."""


class EntropyAwareKL(torch.autograd.Function, metaclass=Inlined):
    """L = reverse_kl + α·1[H_teacher > τ]·forward_kl over the whole vocabulary (arXiv 2603.07079, Eq. 9), in nats.

    ``EntropyAwareKL.apply(student_logits, teacher_logits)`` compares logits ``[..., V]``;
    ``EntropyAwareKL.apply(student_hidden, teacher_hidden, student_weight, teacher_weight)`` compares hidden states
    ``[..., D]`` under heads ``[V, D]``, and logits never exist in full. It returns the loss alone;
    :func:`eopd_kernels.entropy_aware_kl` also returns what was seen on each token.
    """

    @classmethod
    def apply(
        cls,
        student: Tensor,
        teacher: Tensor | TopKTeacher,
        student_weight: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of student logits or hidden states against the teacher's.

        Args:
            student: ``[..., V]`` logits, or ``[..., D_s]`` hidden states with ``student_weight``; any floating dtype.
            teacher: ``[..., V]`` logits, or ``[..., D_t]`` hidden states with ``teacher_weight``; no grad; or a
                :class:`TopKTeacher`.
            student_weight: ``[V, D_s]`` or None.
            teacher_weight: ``[V, D_t]`` or None. Must not require grad.
            **options: the keyword options of :func:`eopd_kernels.entropy_aware_kl`, except the heads.

        Returns:
            The loss in nats, 0-d (``[...]`` with ``reduction="none"``), fp32 (fp64 if an input is fp64).

        Raises:
            TypeError, ValueError: as :func:`eopd_kernels.entropy_aware_kl`.
        """
        student_head = None if student_weight is None else LMHead(student_weight)
        teacher_head = None if teacher_weight is None else LMHead(teacher_weight)
        loss, _ = cls.call(checked(student, teacher, student_head=student_head, teacher_head=teacher_head, **options))
        return loss

    @classmethod
    def call(cls, call: Call) -> tuple[Tensor, Seen]:
        """Loss, and what was seen of the N tokens, of a checked call."""
        if torch.compiler.is_compiling():
            from . import compiled

            obstacle = compiled.obstacle(call.options)
            if obstacle is None:
                return compiled.call(call)
            torch._dynamo.graph_break(msg=obstacle)  # which fullgraph=True makes an error
            return torch._dynamo.disable(cls.call_eagerly)(call)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "EntropyAwareKL cannot be transformed by torch.func (grad, vmap, jvp, ...): the gradient is taken in "
                "forward. Use torch.autograd, with torch.func.functional_call if parameters are to be replaced"
            )
        return cls.call_eagerly(call)

    @classmethod
    def call_eagerly(cls, call: Call) -> tuple[Tensor, Seen]:
        """The same, by autograd's own means."""
        if call.options.inplace:
            check_apart(call.student, call.teacher)
        loss, *seen, _ = super().apply(
            call.student,
            *tensors_of(call.student_head),
            call.teacher,
            *tensors_of(call.teacher_head),
            call.weights,
            call.denominator,
            call.tokens,
            call.options,
        )
        return loss, Seen(*seen)

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [..., D_s] or [..., V]
        student_weight: Tensor | None,  # [V, D_s]
        student_bias: Tensor | None,  # [V]
        teacher: Tensor | None,  # [..., D_t] or [..., V]; None: its likeliest entries are in tokens
        teacher_weight: Tensor | None,  # [V, D_t]
        teacher_bias: Tensor | None,  # [V]
        token_weights: Tensor,  # [N]
        denominator: Tensor | None,  # 0-d
        tokens: Tokens,
        options: Options,
    ) -> tuple[Tensor, ...]:
        tensors = (student, student_weight, student_bias, teacher, teacher_weight, teacher_bias)
        solved = solve(tensors, token_weights, denominator, tokens, options)
        seen = solved.seen
        anchor = solved.loss.new_empty(0)
        if any(options.needs_gradient):
            again = () if options.schedule == "chunked" else (*tensors, denominator, seen.packed)
            ctx.save_for_backward(*again, *solved.kept, anchor)
        ctx.options = solved.options
        ctx.forms = [None if t is None else (t.dtype, t.shape) for t in tensors[:3]]
        outputs = (seen.packed, seen.gate, seen.reverse, seen.forward, seen.loss)
        ctx.mark_non_differentiable(*outputs)
        return solved.loss, *outputs, anchor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return (None,) * 10
        if torch._C._functorch.is_legacy_batchedtensor(upstream[0]):
            raise RuntimeError(
                "EntropyAwareKL cannot be vectorized over gradients (is_grads_batched, jacobian(vectorize=True)): ask "
                "for one at a time"
            )
        *saved, anchor = ctx.saved_tensors
        with torch.no_grad():
            gradients = BACKWARD[ctx.options.schedule](ctx, saved, upstream[0])
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, upstream[0], anchor)
        return *gradients, *(None,) * 7


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
    losses = weighted(token_weights, seen.loss)
    if options.reduction == "none":
        loss = losses.view(student.shape[:-1])
    else:
        loss = losses.sum() if denominator is None else losses.sum() / denominator
    return Solved(loss, seen, kept, options)


def backward_chunked(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> Gradients:
    """Scales the gradients that forward took. They are scaled in place where this is the graph's last backward."""
    later, *stored = saved
    factor = outstanding(upstream, later, ctx.forms[0][1][:-1])
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    if last and later is None and devices.readable(factor) and factor == 1:  # elsewhere this waits for the device
        return as_inputs(stored, ctx.forms)
    # Into a tensor of its dtype: fp16 times fp32 would be another N × V in fp32.
    scaled = [g if g is None else torch.mul(g, factor, out=g if last else torch.empty_like(g)) for g in stored]
    return as_inputs(scaled, ctx.forms)


def backward_recompute(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> Gradients:
    """Visits every block once more, now that the upstream gradient of each token is known."""
    *tensors, denominator, packed, weights, a, b, c, ids, present, own_a, values = saved
    own = None if ids is None else Own(ids, present, own_a, values)
    gradients = solve_again(tensors, upstream, denominator, packed, weights, Coefficients(a, b, c), own, ctx.options)
    return as_inputs(gradients, ctx.forms)


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


BACKWARD = {"chunked": backward_chunked, "recompute": backward_recompute}


def as_inputs(gradients: Sequence[Tensor | None], forms: Sequence[tuple[torch.dtype, torch.Size]]) -> Gradients:
    """The accumulated gradients in the dtypes and shapes of the inputs."""
    pairs = zip(gradients, forms, strict=True)
    return tuple(None if g is None else g.to(form[0]).view(form[1]) for g, form in pairs)


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
        if devices.readable(weights):
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
    on_host = student_weight is not None and devices.readable(like)
    return on_host and reverse == reverse_gate == 0 and looks_away and objective.gate != "always"


def completed(seen: Seen, packed: Tensor, gate: Tensor) -> Seen:
    """What is known of tokens that were not visited, put in: the teacher's statistics. The rest of theirs is NaN."""
    shut = (gate == 0).unsqueeze(1)
    return replace(seen, packed=torch.where(shut, packed, seen.packed), gate=gate)


class FirstDerivative(torch.autograd.Function):
    """Hands gradients through and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError(
            "EntropyAwareKL has no second derivative: its gradient is computed by kernels that are not differentiable. "
            "For a double backward use eopd_kernels.reference.entropy_aware_kl"
        )


def refuse_second_derivative(gradients: Gradients, upstream: Tensor, anchor: Tensor) -> Gradients:
    """The gradients with a graph that raises, so that a double backward is never silently zero.

    The graph has to lead somewhere: autograd.grad() runs only what lies between the gradients and the tensors that it
    is asked about. Those are what the gradients depend on: the incoming gradient, and the inputs of the loss, to which
    the ``anchor``, an empty output of the loss, leads without keeping them alive.
    """
    refusing = iter(FirstDerivative.apply(upstream, anchor, *(g for g in gradients if g is not None)))
    return tuple(None if g is None else next(refusing) for g in gradients)
