"""Masked tokens: left out of the products where their number may be asked for, else carried along with weight 0."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import tensors
from ..inputs.record import Call

# Rows of logits are copied together only where at most this share of them is left: the copy costs up to 16 bytes a
# logit, the products that are saved 4·D flops.
COMPACT_BELOW = 0.75


class Visited(NamedTuple):
    """The tokens that a call visits.

    Args:
        rows: ``[M]`` their places, ascending, or None where all N are visited.
        valid: ``[N]`` whether a token counts, where masked ones ride along; None where none does.
    """

    rows: Tensor | None
    valid: Tensor | None


def visited(call: Call, weights: Tensor, before: Visited | None = None) -> Visited:
    """Returns the tokens to visit under the weights ``[N]``.

    A student that is logits has no products, and its kernels do not read rows of weight 0. For hidden states the tokens
    are counted: at once on a CPU, with one wait for any other device, unless the caller forbids it (``wait_free``), a
    CUDA graph is captured or the tensors have no numbers. Then masked tokens ride along.

    Args:
        before: what this returned in forward, so that no device is asked twice.
    """
    options = call.options
    if call.student_head is None:
        return Visited(None, None)
    if before is not None and before.rows is not None:
        return before
    host = tensors.readable(weights)
    all_count = weights is call.weights and not options.some_weigh_nothing
    if all_count or not (host or options.some_weigh_nothing):
        return Visited(None, None)
    valid = weights != 0
    if not host and (before is not None or options.wait_free or not tensors.may_wait(weights)):
        return Visited(None, valid)
    rows = valid.nonzero().squeeze(1)
    if len(rows) == len(valid):
        return Visited(None, None)
    copied = not host and call.teacher is not None and call.teacher_head is None
    if copied and len(rows) > COMPACT_BELOW * len(valid):
        return Visited(None, valid)
    return Visited(rows, None)
