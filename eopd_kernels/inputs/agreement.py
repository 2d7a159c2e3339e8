"""Agreement of the ranks of a ``tensor_parallel_group`` on a call: what must be the same on each of them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..distributed.exchange import Exchange
from ..distributed.vocabulary import shard_of
from ..heads.lm_head import LMHead
from ..objective.gates import EntropyGate, QuantileGate
from ..tensors import uniform_rows
from .record import Call
from .sides import width


def among_ranks(call: Call, exchange: Exchange, vocab_size: int | None, sums_hidden_gradient: bool) -> Call:
    """Returns the call with this rank's shard of the vocabulary, once all ranks have shown that they were called alike.

    Raises:
        ValueError: on every rank, where they were not, or their shards do not fit together.
    """
    shard = shard_of(
        exchange,
        student=width(call.student, call.student_head),
        teacher=None if call.teacher is None else width(call.teacher, call.teacher_head),
        vocab_size=vocab_size,
        alike=alike(call) | {"partial_hidden_gradient": not sums_hidden_gradient},
        numbers=[call.weights, call.denominator, *said(call).values()],
        sums_hidden_gradient=sums_hidden_gradient,
    )
    return replace(call, options=replace(call.options, local_vocab_size=shard.size, shard=shard))


def said(call: Call) -> dict[str, Any]:
    """Returns what was said of the tokens, by name."""
    return {field.name: getattr(call.tokens, field.name) for field in fields(call.tokens)}


def alike(call: Call) -> dict[str, Any]:
    """Returns the options that decide what is computed and in what pieces; no other rank notices the backend."""
    options, sides = call.options, [(call.student, call.student_head), (call.teacher, call.teacher_head)]
    objective = options.objective
    known_gate = isinstance(objective.gate, (str, EntropyGate, QuantileGate))

    def shown(head: LMHead | None) -> Any:
        return head and (head.weight.shape[1], head.bias is not None, head.scale, head.softcap)

    return {
        "leading": tuple(call.leading),
        "rows of one stride": [uniform_rows(side)[1] for side, head in sides if side is not None and head is None],
        "dtypes": [str(t.dtype) for t in call.sides() if t is not None and t.dim() > 1],
        "heads": [shown(head) for _, head in sides],
        "said of the tokens": {name: tuple(t.shape[1:]) for name, t in said(call).items() if t is not None},
        "objective": replace(objective, gate="always"),
        "gate": objective.gate if known_gate else getattr(objective.gate, "__qualname__", "a callable"),
        "reduction": options.reduction,
        "schedule": options.schedule,
        "differentiated": [any(options.needs_gradient), call.student_head is not None and options.needs_gradient[0]],
        "gradient_filter": options.gradient_filter,
        "inplace": options.inplace,
        "wait_free": options.wait_free,
        "workspace_bytes": options.workspace_bytes,
        "autocast": options.autocast,
    }
