"""Kernels whose traffic is known: one reads a block once and writes it, the other also reads a number per row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double_kernel(x, out, columns, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    for start in range(0, columns, BLOCK):
        mask = start + offsets < columns
        value = tl.load(x + row + start + offsets, mask=mask)
        tl.store(out + row + start + offsets, (2 * value).to(out.dtype.element_ty), mask=mask)


@triton.jit
def scale_rows_kernel(x, factors, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    value = tl.load(x + row * columns + offsets, mask=mask)
    tl.store(x + row * columns + offsets, value * tl.load(factors + row), mask=mask)
