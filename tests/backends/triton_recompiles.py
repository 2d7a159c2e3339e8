"""``python -m tests.backends.triton_recompiles``: what a second batch size compiles, for a GPU that is not there."""

from __future__ import annotations

import torch

from eopd_kernels.rows import FUNCTIONS
from eopd_kernels.testing.absent_gpu import DEVICES, compiling_for

# Aligned rows; rows aligned in fp32 whose end is ragged; rows that begin anywhere.
CASES = [(4096, torch.float32), (4096, torch.bfloat16), (4100, torch.float32), (4095, torch.bfloat16)]
TRANSFORMS = [1.0, 0.0, 1.0, 0.7, 30.0, 2.0]


def kernels_of(rows: int, first: int, vocab_size: int, dtype: torch.dtype) -> set[int]:
    """The kernels that the functions use on ``rows`` rows, of which ``first`` others lie before."""
    student, teacher, out = torch.empty(3, first + rows, vocab_size, dtype=dtype)[:, first:].unbind()
    statistics = torch.empty(first + rows, 8)[first:]
    per_row = torch.empty(first + rows)[first:]
    coefficients = (per_row, per_row, per_row)
    launch = FUNCTIONS["triton"]
    with compiling_for(DEVICES["sm_90"]) as compiled:
        launch.row_statistics(student, teacher, TRANSFORMS)
        launch.row_gradient(student, teacher, statistics, *coefficients, TRANSFORMS, out)
        launch.row_loss_and_gradient(student, teacher, per_row, 0.8, [1.0, 0.0, 0.0, 1.0], TRANSFORMS, out)
        launch.row_mixture(student, teacher, statistics, [0.1, 0.2], TRANSFORMS)
        launch.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.1, 0.2], TRANSFORMS, out)
    return {id(kernel) for kernel in compiled}


def main() -> None:
    for vocab_size, dtype in CASES:
        # Many rows at a time and few, and chunks that begin anywhere.
        for usual, others in ((512, [(513, 0), (4096, 0), (293, 7), (66, 1)]), (5, [(1, 0), (3, 3), (65, 1)])):
            known = kernels_of(usual, 0, vocab_size, dtype)
            for rows, first in others:
                new = kernels_of(rows, first, vocab_size, dtype) - known
                assert not new, f"{rows} rows from {first} compile {len(new)} kernels, V = {vocab_size}, {dtype}"


if __name__ == "__main__":
    main()
