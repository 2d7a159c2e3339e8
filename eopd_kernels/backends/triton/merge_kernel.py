"""The merge of a row's parts, where few rows are split over many programs, and its gate: docs/math.md, "The merge"."""

import triton
import triton.language as tl

from .numbers import number, store_coefficients, store_statistics
from .row_math import Combine, RowStatistics, gated_coefficients, gated_loss, merge, open_gate


@triton.jit(
    do_not_specialize=["parts"],
    do_not_specialize_on_alignment=["partial", "statistics", "weights", "gate", "loss", "a", "b", "c"],
)
def merge_parts_kernel(
    partial,  # [n · parts, 8]
    parts,
    statistics,  # [n, 8], written
    weights,  # [n], or None: no gate and no coefficients are wanted
    gate_threshold: tl.float64,
    reverse: tl.float64,
    reverse_gate: tl.float64,
    forward: tl.float64,
    forward_gate: tl.float64,
    gate,  # [n], written
    loss,  # [n], written
    a,  # [n], written
    b,  # [n], written
    c,  # [n], written
    MOST_PARTS: tl.constexpr,
):
    """Launched on a grid (n,). A part is a lane."""
    row = tl.program_id(0)
    part = tl.arange(0, MOST_PARTS)  # [MOST_PARTS]
    first = partial + (row.to(tl.int64) * parts + part) * 8
    there = part < parts
    numbers = merge(
        RowStatistics(
            tl.load(first, mask=there, other=float("-inf")),
            tl.load(first + 1, mask=there, other=0.0),
            tl.load(first + 2, mask=there, other=float("-inf")),
            tl.load(first + 3, mask=there, other=0.0),
            tl.load(first + 4, mask=there, other=0.0),
            tl.load(first + 5, mask=there, other=0.0),
            tl.load(first + 6, mask=there, other=0.0),
            tl.load(first + 7, mask=there, other=0.0),
        )
    )
    store_statistics(statistics, row, numbers)
    if weights is not None:
        dtype: tl.constexpr = statistics.dtype.element_ty
        weight = tl.load(weights + row)
        combine = Combine(
            number(reverse, dtype), number(reverse_gate, dtype), number(forward, dtype), number(forward_gate, dtype)
        )
        opened = open_gate(numbers, weight, number(gate_threshold, dtype))
        tl.store(gate + row, opened)
        tl.store(loss + row, gated_loss(numbers, opened, weight, combine))
        store_coefficients(a, b, c, row, gated_coefficients(numbers, opened, weight, combine))
