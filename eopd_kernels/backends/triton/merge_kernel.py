"""Few rows are split over many programs: this merges a row's parts (docs/math.md, "The merge") and sets its gate."""

import triton
import triton.language as tl

from .numbers import number, store_statistics
from .row_math import gated_coefficients, merged_lanes


@triton.jit(
    do_not_specialize=["parts"],
    do_not_specialize_on_alignment=["partial", "statistics", "weights", "gate", "a", "b", "c"],
)
def merge_parts_kernel(
    partial,  # [n · parts, 8]
    parts,
    statistics,  # [n, 8], out
    weights,  # [n], or None: no gate and no coefficients are wanted
    gate_threshold: tl.float64,
    r0: tl.float64,
    r1: tl.float64,
    f0: tl.float64,
    f1: tl.float64,
    gate,  # [n], out
    a,  # [n], out
    b,  # [n], out
    c,  # [n], out
    MOST_PARTS: tl.constexpr,
):
    """Grid (n,). A part is a lane."""
    row = tl.program_id(0)
    part = tl.arange(0, MOST_PARTS)  # [MOST_PARTS]
    first = partial + (row.to(tl.int64) * parts + part) * 8
    there = part < parts
    s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = merged_lanes(
        tl.load(first, mask=there, other=float("-inf")),
        tl.load(first + 1, mask=there, other=0.0),
        tl.load(first + 2, mask=there, other=float("-inf")),
        tl.load(first + 3, mask=there, other=0.0),
        tl.load(first + 4, mask=there, other=0.0),
        tl.load(first + 5, mask=there, other=0.0),
        tl.load(first + 6, mask=there, other=0.0),
        tl.load(first + 7, mask=there, other=0.0),
    )
    store_statistics(statistics, row, s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross)
    if weights is not None:
        dtype: tl.constexpr = statistics.dtype.element_ty
        open_gate, own, ratio, other = gated_coefficients(
            s_sum,
            t_sum,
            t_self,
            s_cross,
            tl.load(weights + row),
            number(gate_threshold, dtype),
            number(r0, dtype),
            number(r1, dtype),
            number(f0, dtype),
            number(f1, dtype),
        )
        tl.store(gate + row, open_gate)
        tl.store(a + row, own)
        tl.store(b + row, ratio)
        tl.store(c + row, other)
