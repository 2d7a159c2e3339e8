"""The two variants of a kernel, and no more: for rows that all begin at multiples of 16 bytes, and for any rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton

# Bytes: what Triton specialises an address on, and the widest load.
ALIGNMENT = 16
# What else Triton looks at: the addresses of matrices where rows are aligned, and always V and the options.
MATRICES, ALWAYS = {"student", "teacher", "out"}, {"vocab_size", "OPTIONS"}


class Variants(NamedTuple):
    """A kernel for any rows, and for aligned ones: there Triton is left to see that the matrices' addresses are."""

    any_rows: Any
    aligned: Any


def by_alignment(kernel: Callable[..., None]) -> Variants:
    """``triton.jit`` that looks at no stride, not at the number of parts and at no address but the matrices'.

    A chunk begins anywhere in a tensor: each of these would compile anew for chunks that differ in nothing else.
    """
    names = inspect.signature(kernel).parameters.keys() - ALWAYS
    numbers = [name for name in names if name.endswith("_stride") or name == "parts"]

    def jit(ignored: set[str]) -> Any:
        return triton.jit(do_not_specialize=numbers, do_not_specialize_on_alignment=ignored)(kernel)

    return Variants(jit(names), jit(names - MATRICES))
