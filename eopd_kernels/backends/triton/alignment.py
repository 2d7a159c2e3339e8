"""The two variants of a kernel, and no more: for rows that all begin at multiples of 16 bytes, and for any rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton

# Bytes: what Triton specialises an address on, and the widest load.
ALIGNMENT = 16


class Variants(NamedTuple):
    """A kernel for any rows, and for aligned ones: there Triton is left to see that the matrices' addresses are."""

    any_rows: Any
    aligned: Any


def by_alignment(
    *, matrices: Sequence[str], per_row: Sequence[str], numbers: Sequence[str]
) -> Callable[[Callable[..., None]], Variants]:
    """``triton.jit`` that looks at neither the addresses of ``per_row`` tensors nor the values of ``numbers``.

    A chunk begins anywhere in a tensor, so that either would compile anew for chunks that differ in nothing else.
    """

    def decorate(kernel: Callable[..., None]) -> Variants:
        def jit(ignored: Sequence[str]) -> Any:
            return triton.jit(do_not_specialize=list(numbers), do_not_specialize_on_alignment=list(ignored))(kernel)

        return Variants(jit([*matrices, *per_row]), jit(per_row))

    return decorate
