"""EntropyAwareKL: the torch.autograd.Function that all functions of the package end in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from . import compiled, tensors
from .heads.lm_head import LMHead
from .inputs.check import checked
from .inputs.keywords import ALL, Keywords, shown_with, with_defaults
from .inputs.options import check_apart
from .inputs.record import Call
from .inputs.top_k_teacher import TopKTeacher
from .schedules.fp16 import outstanding
from .schedules.seen import Seen
from .schedules.solve import as_inputs, solve, solve_again
from .second_derivative import Gradients, refuse_second_derivative

WITHOUT_HEADS = tuple(name for name in ALL if not name.endswith("_head"))


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
    @shown_with(WITHOUT_HEADS)
    def apply(
        cls,
        student: Tensor,
        teacher: Tensor | TopKTeacher | None,
        student_weight: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        **keywords: Unpack[Keywords],
    ) -> Tensor:
        """The loss of student logits or hidden states against the teacher's.

        Args:
            student: ``[..., V]`` logits, or ``[..., D_s]`` hidden states with ``student_weight``; any floating dtype.
            teacher: ``[..., V]`` logits, or ``[..., D_t]`` hidden states with ``teacher_weight``; no grad; or a
                :class:`TopKTeacher` or None.
            student_weight: ``[V, D_s]`` or None.
            teacher_weight: ``[V, D_t]`` or None. Must not require grad.
            **keywords: those of :func:`eopd_kernels.entropy_aware_kl`, except the heads.

        Returns:
            The loss in nats, 0-d (``[...]`` with ``reduction="none"``), fp32 (fp64 if an input is fp64).

        Raises:
            TypeError, ValueError: as :func:`eopd_kernels.entropy_aware_kl`.

        Example::

            hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
            teacher_hidden, teacher_weight = torch.randn(3, 16), torch.randn(50, 16)
            EntropyAwareKL.apply(hidden, teacher_hidden, weight, teacher_weight).backward()
        """
        given = with_defaults("EntropyAwareKL.apply", keywords, WITHOUT_HEADS)
        given["student_head"] = None if student_weight is None else LMHead(student_weight)
        given["teacher_head"] = None if teacher_weight is None else LMHead(teacher_weight)
        return cls.of(checked(student, teacher, given))[0]

    @classmethod
    def of(cls, call: Call) -> tuple[Tensor, Seen]:
        """Returns the loss of a checked call, and what was seen of its N tokens."""
        if torch.compiler.is_compiling():
            obstacle = compiled.obstacle(call.options)
            if obstacle is None:
                return compiled.call(call)
            torch._dynamo.graph_break(msg=obstacle)  # which fullgraph=True makes an error
            return torch._dynamo.disable(cls.of)(call)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "EntropyAwareKL cannot be transformed by torch.func (grad, vmap, jvp, ...): the gradient is taken in "
                "forward. Use torch.autograd, with torch.func.functional_call if parameters are to be replaced"
            )
        if call.options.inplace:
            check_apart(call.student, call.teacher)
        seen: list[Seen] = []
        loss, _ = super().apply(*call.differentiable(), call, seen)
        return loss, seen[0]

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [..., D_s] or [..., V]
        student_weight: Tensor | None,  # [V, D_s]
        student_bias: Tensor | None,  # [V]
        call: Call,
        seen_here: list[Seen],  # filled
    ) -> tuple[Tensor, Tensor]:
        sides = (student, student_weight, student_bias)  # asked before inplace=True writes to one
        ctx.forms = [None if t is None else (tensors.gradient_dtype(t), t.shape) for t in sides]
        loss, seen, kept, visited = solve(call)
        seen_here.append(seen)
        anchor = loss.new_empty(0)
        ctx.schedule = call.options.schedule
        if any(call.options.needs_gradient):
            if ctx.schedule == "recompute":
                kept = (*call.sides(), seen.packed, *kept)
                ctx.call, ctx.visited = call.without_sides(), visited
            ctx.save_for_backward(*kept, anchor)
        ctx.set_materialize_grads(False)
        return loss, anchor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return (None,) * 5
        if torch._C._functorch.is_legacy_batchedtensor(upstream[0]):
            raise RuntimeError(
                "EntropyAwareKL cannot be vectorized over gradients (is_grads_batched, jacobian(vectorize=True)): ask "
                "for one at a time"
            )
        *saved, anchor = ctx.saved_tensors
        with torch.no_grad():
            gradients = BACKWARD[ctx.schedule](ctx, saved, upstream[0])
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, upstream[0], anchor)
        return *gradients, None, None


def backward_chunked(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> Gradients:
    """Scales the gradients that forward took. They are scaled in place where this is the graph's last backward."""
    later, *stored = saved
    factor = outstanding(upstream, later, ctx.forms[0][1][:-1])
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    # Elsewhere a look at the factor would wait for the device.
    if last and later is None and tensors.readable(factor) and factor.item() == 1:
        return as_inputs(stored, ctx.forms)
    pairs = zip(stored, ctx.forms, strict=True)
    return as_inputs([None if g is None else scaled(g, factor, form[0], last) for g, form in pairs], ctx.forms)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """Multiplies a stored gradient; the ``last`` time its memory may be used.

    A GPU's kernel rounds to the input's ``dtype`` on its way, one pass instead of two. On a CPU torch would allocate
    the product in the wider dtype first: there it goes into a tensor of the gradient's own.
    """
    if gradient.dtype != dtype and not tensors.on_host(gradient.device):
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return torch.mul(gradient, factor, out=gradient if last else torch.empty_like(gradient))


def backward_recompute(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> Gradients:
    """Visits every block once more, now that the upstream gradient of each token is known."""
    sides, packed, kept = saved[:6], saved[6], saved[7:]
    return as_inputs(solve_again(ctx.call.with_sides(sides), upstream, packed, kept, ctx.visited), ctx.forms)


BACKWARD = {"chunked": backward_chunked, "recompute": backward_recompute}
