"""The loss as custom ops: what torch.compile sees of it, instead of loops over chunks and kernels.

    loss(arguments)                             -> the loss, what was seen of the tokens, what backward needs
    loss_backward(upstream, kept, arguments)    -> the gradients, under the schedule "recompute"

Traced, the loops would unroll and the graph would hold for one number of tokens. As an op the loss is one node whose
fake knows the shapes; everything below it happens when the graph runs, looking at a CPU's numbers included. Under the
schedule "chunked" backward is a few products, which the compiler may fuse with what follows, so it is no op.

An op takes tensors, numbers and text, so the options are spelt out (:func:`spelt`). A handle would not do: compiled
graphs are kept on disk and run in processes in which that handle means something else.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .heads.lm_head import LMHead
from .inputs.per_token import check_count, check_log_probs, check_vocabulary, check_weights
from .inputs.record import Call, Options, Tokens
from .objective.gates import EntropyGate, QuantileGate
from .objective.halves import Sampled, Skewed, TopK
from .objective.objective import Objective
from .rows import LIBRARY, OPS
from .schedules.fp16 import outstanding
from .schedules.seen import Seen
from .schedules.solve import as_inputs, solve, solve_again
from .second_derivative import Gradients, refuse_second_derivative
from .tensors import compute_dtype


class Arguments(NamedTuple):
    """What the ops take: the tensors of a call (N tokens), the sizes, which may be symbolic, and the other options."""

    student: Tensor  # [..., D_s] or [..., V]
    student_weight: Tensor | None  # [V, D_s]
    student_bias: Tensor | None  # [V]
    teacher: Tensor | None  # [..., D_t] or [..., V]
    teacher_weight: Tensor | None  # [V, D_t]
    teacher_bias: Tensor | None  # [V]
    weights: Tensor  # [N]
    denominator: Tensor | None  # 0-d
    token_ids: Tensor | None  # from here on as in Tokens
    old_log_probs: Tensor | None
    advantages: Tensor | None
    gate: Tensor | None
    reverse_weights: Tensor | None
    forward_weights: Tensor | None
    top_ids: Tensor | None
    top_log_probs: Tensor | None
    top_present: Tensor | None
    teacher_entropy: Tensor | None
    teacher_token_log_probs: Tensor | None
    local_vocab_size: int
    workspace_bytes: int | None
    spelling: str

    @classmethod
    def of(cls, call: Call) -> Arguments:
        """Spells out the heads and options of a call."""
        return cls(
            *call.sides(),
            call.weights,
            call.denominator,
            **{name: getattr(call.tokens, name) for name in TOKENS},
            local_vocab_size=call.options.local_vocab_size,
            workspace_bytes=call.options.workspace_bytes,
            spelling=repr(spelt((call.options, done_to_logits(call.student_head), done_to_logits(call.teacher_head)))),
        )

    @property
    def call(self) -> Call:
        """The call that :meth:`of` was given."""
        options, *scales = read(self.spelling)
        options = replace(options, local_vocab_size=self.local_vocab_size, workspace_bytes=self.workspace_bytes)
        weights = (self.student_weight, self.student_bias), (self.teacher_weight, self.teacher_bias)
        student_head, teacher_head = (
            None if weight is None else LMHead(weight, bias, scale=scale[0], softcap=scale[1])
            for (weight, bias), scale in zip(weights, scales, strict=True)
        )
        tokens = Tokens(**{name: getattr(self, name) for name in TOKENS})
        return Call(
            self.student, self.teacher, student_head, teacher_head, self.weights, self.denominator, tokens, options
        )

    @property
    def options(self) -> Options:
        """The options of the call, but for the sizes."""
        return read(self.spelling)[0]


def done_to_logits(head: LMHead | None) -> tuple[float, float | None] | None:
    """Returns scale and softcap of a head."""
    return None if head is None else (head.scale, head.softcap)


TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", str: "str"}
SCHEMA = ", ".join(f"{TYPES[kind]} {name}" for name, kind in get_type_hints(Arguments).items())
TOKENS = tuple(field.name for field in fields(Tokens))
RECORD_TYPES = (EntropyGate, Objective, Options, QuantileGate, Sampled, Skewed, TopK)
RECORDS: dict[str, Any] = {record.__name__: record for record in RECORD_TYPES}
SIZES = ("local_vocab_size", "workspace_bytes")


def spelt(value: Any) -> Any:
    """Returns ``value`` as a literal; a record becomes its name and what is in its fields, but for the sizes.

    Raises:
        TypeError: it holds something that a text cannot say, such as a callable gate.
    """
    if type(value) in RECORD_TYPES:
        names = [field.name for field in fields(value)]
        return (type(value).__name__, *[None if name in SIZES else spelt(getattr(value, name)) for name in names])
    if isinstance(value, tuple):
        return ("tuple", *[spelt(part) for part in value])
    if isinstance(value, torch.dtype):
        return ("dtype", str(value))
    if isinstance(value, int | float):
        # A number that torch.compile keeps symbolic becomes a constant of the graph: each value has a graph of its own.
        return guarded(value) if torch.compiler.is_compiling() else value
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"torch.compile takes options that can be written down, got {value!r}")


def guarded(number: float) -> float:
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # imports sympy: a second

    return guard_scalar(number)


@functools.lru_cache(maxsize=1024)
def read(spelling: str) -> Any:
    """Returns what was :func:`spelt`."""

    def built(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        kind, *parts = value
        if kind == "dtype":
            return getattr(torch, parts[0].removeprefix("torch."))
        return tuple(map(built, parts)) if kind == "tuple" else RECORDS[kind](*map(built, parts))

    return built(ast.literal_eval(spelling))


def call(call: Call) -> tuple[Tensor, Seen]:
    """Returns the loss of a checked call that is traced, and what was seen of its N tokens."""
    loss, *rest = OPS.loss(*Arguments.of(call))
    return loss, Seen.of_tensors(*rest[: seen_tensors(call.tokens.token_ids)])


def obstacle(options: Options) -> str | None:
    """Returns why a call with these options cannot be an op, or None."""
    if options.inplace:
        return "inplace=True overwrites an input, which an op with a gradient may not"
    if options.shard is not None:
        return "a tensor_parallel_group is no part of a graph"
    if not isinstance(options.objective.gate, str | EntropyGate | QuantileGate):
        return f"a callable gate cannot be part of a graph, got {options.objective.gate!r}; gate= takes its values"
    return None


def loss(*given: Any) -> list[Tensor]:
    """Returns the loss, the tensors of :class:`Seen`, and what backward needs, as in
    :class:`~eopd_kernels.schedules.solve.Solved`."""
    call = Arguments(*given).call
    options, tokens = call.options, call.tokens
    check_vocabulary(tokens, options.objective, options.local_vocab_size)
    check_weights(call.weights)
    said = {
        "old_log_probs": tokens.old_log_probs,
        "TopKTeacher.log_probs": tokens.top_log_probs,
        "TopKTeacher.token_log_probs": tokens.teacher_token_log_probs,
    }
    for name, log_probs in said.items():
        if log_probs is not None:
            check_log_probs(name, log_probs)
    if call.denominator is not None:
        check_count(call.denominator)
    solved = solve(call)
    first, *kept = solved.kept or (None,)
    if any(options.needs_gradient):
        if call.student_head is not None and options.schedule == "chunked":
            # How many tokens count decides whether dW is rounded; no number may decide the dtype of an op's output.
            dtype = compute_dtype(*call.differentiable())
            kept = [t if t is None else t.to(dtype) for t in kept]
        # "chunked": what is still to multiply the gradients, 1 for nothing; "recompute": the weights. Often that is an
        # argument, which an op may not hand out.
        kept.insert(0, call.weights.new_ones(()) if first is None else first.clone())
    outputs = [solved.loss, *solved.seen.tensors(), *[t for t in kept if t is not None]]
    return [*outputs, solved.loss.new_empty(0)]  # the anchor of refuse_second_derivative


def loss_fake(*given: Any) -> list[Tensor]:
    arguments = Arguments(*given)
    options, new, n = arguments.options, arguments.weights.new_empty, arguments.weights.shape[0]
    outputs = [new(arguments.student.shape[:-1] if options.reduction == "none" else ()), new(n, 8)]
    outputs += [new(n) for _ in range(4)] + ([] if arguments.token_ids is None else [new(n, 2)])
    if not any(options.needs_gradient):
        return [*outputs, new(0)]
    inputs = arguments.student, arguments.student_weight, arguments.student_bias
    if options.schedule == "chunked":
        hidden = arguments.student_weight is not None
        dtype = compute_dtype(*inputs) if hidden else arguments.student.dtype
        student = arguments.student.flatten(0, -2) if hidden else arguments.student
        needed = [t for t, needs in zip((student, *inputs[1:]), options.needs_gradient, strict=True) if needs]
        later = new(n) if not hidden and dtype == torch.float16 else new(())
        outputs += [later, *[t.new_empty(t.shape, dtype=dtype) for t in needed if t is not None]]
        return [*outputs, new(0)]
    outputs += [new(n) for _ in ("weights", "a", "b", "c")]
    k = own_columns(options.objective, arguments.top_ids)
    if k:
        outputs += [new(n, k, dtype=torch.int64), new(n, k, dtype=torch.bool), new(n), new(n, k)]
    return [*outputs, new(0)]


def seen_tensors(token_ids: Tensor | None) -> int:
    """Returns how many tensors a :class:`Seen` has."""
    return 5 if token_ids is None else 6


def own_columns(objective: Objective, top_ids: Tensor | None) -> int:
    """Returns how many columns of a row have a gradient of their own."""
    halves = objective.reverse, objective.forward
    tops = [half.k if top_ids is None else top_ids.shape[1] for half in halves if isinstance(half, TopK)]
    k = isinstance(objective.reverse, Sampled) + (objective.cross_entropy != 0) + sum(tops)
    return k


def loss_backward(upstream: Tensor, packed: Tensor, kept: Sequence[Tensor], *given: Any) -> list[Tensor]:
    """Returns the gradients of student, weight and bias that are needed, in their dtypes."""
    call = Arguments(*given).call
    forms: Any = [None if t is None else (t.dtype, t.shape) for t in call.differentiable()]
    return [g for g in as_inputs(solve_again(call, upstream, packed, kept), forms) if g is not None]


def loss_backward_fake(upstream: Tensor, packed: Tensor, kept: Sequence[Tensor], *given: Any) -> list[Tensor]:
    arguments = Arguments(*given)
    pairs = zip(arguments[:3], arguments.options.needs_gradient, strict=True)
    return [t.new_empty(t.shape) for t, needs in pairs if t is not None and needs]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    arguments = Arguments(*inputs)
    _, packed, *rest = output
    kept = rest[seen_tensors(arguments.token_ids) - 1 :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:-1])
    ctx.forms = [None if t is None else (t.dtype, t.shape) for t in arguments[:3]]
    ctx.rest = arguments[-3:]
    ctx.recompute = arguments.options.schedule == "recompute"
    ctx.needs = arguments.options.needs_gradient
    again = (packed, *arguments[:-3]) if ctx.recompute else ()
    ctx.save_for_backward(*again, *kept)


def backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if upstream[0] is None:
        return (None,) * len(Arguments._fields)
    *saved, anchor = ctx.saved_tensors
    gradients = gradients_of(ctx, saved, upstream[0])
    if torch.is_grad_enabled():
        gradients = refuse_second_derivative(gradients, upstream[0], anchor)
    return *gradients, *(None,) * (len(Arguments._fields) - 3)


def gradients_of(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> Gradients:
    with torch.no_grad():
        if ctx.recompute:
            tensors = len(Arguments._fields) - 3
            packed, *saved = saved
            found = OPS.loss_backward(upstream, packed, saved[tensors:], *saved[:tensors], *ctx.rest)
        else:
            later, *stored = saved
            factor = outstanding(upstream, later, ctx.forms[0][1][:-1])
            found = [g * factor for g in stored]
    found = iter(found)
    return as_inputs([next(found) if needs else None for needs in ctx.needs], ctx.forms)


def register(name: str, schema: str, implementation: Any, fake: Any) -> None:
    LIBRARY.define(f"{name}({schema}) -> Tensor[]")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)


register("loss", SCHEMA, loss, loss_fake)
register("loss_backward", f"Tensor upstream, Tensor packed, Tensor[] kept, {SCHEMA}", loss_backward, loss_backward_fake)
torch.library.register_autograd(f"{LIBRARY.ns}::loss", backward, setup_context=setup_context, lib=LIBRARY)
