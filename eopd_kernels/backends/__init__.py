"""The backends: a module or folder each, with the kernels of the five row functions of :mod:`eopd_kernels.rows`.

Each has

- ``unavailable()``: None if it can be used, else why not, in one sentence; ``description()``: a line about it;
- ``TENSORS`` and ``takes(device)``: which tensors it can be given, in words and as a question;
- ``kernels()``: what has the five functions, loaded with the first call. They are given arguments that were checked
  and memory for every result, and return nothing;
- ``problem(block)`` and ``at(tensor)``: a :class:`Block`, and a tensor with one, four or eight numbers per row, as
  these kernels take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """The logits of a call of a row function, and where their gradient goes.

    Args:
        student: ``[n, V]`` raw logits, last stride 1.
        teacher: ``[n, V]``, likewise.
        transforms: scale, softcap (0: none) and temperature of the student, then of the teacher.
        out: ``[n, V]``, takes the gradient; may be the student, and is where there is none.
        visits: how often the function reads a row; two are worth keeping it on the chip.
    """

    student: Tensor
    teacher: Tensor
    transforms: Sequence[float]
    out: Tensor
    visits: int = 1


def unchanged(value: Any) -> Any:
    """The ``problem`` and the ``at`` of kernels that take blocks and tensors as they are."""
    return value
