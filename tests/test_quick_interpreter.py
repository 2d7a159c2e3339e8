"""Triton's interpreter makes the same numbers, whether it remembers what it worked out or not."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

from eopd_kernels.backends import triton
from eopd_kernels.rows import FUNCTIONS
from tests import quick_interpreter
from tests.test_rows import DTYPES, TRANSFORMS, block, random_coefficients

interpreted = triton.unavailable() is None and triton.takes(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(not interpreted, reason="Triton's kernels are not interpreted"),
    pytest.mark.skipif(not quick_interpreter.REPLACED, reason="the interpreter of this Triton is not known"),
]


def results(dtype: torch.dtype, transforms: list[float]) -> list[Tensor]:
    """Of all five functions, on rows of a tile and a ragged end, and on a row that is split."""
    functions, found = FUNCTIONS["triton"], []
    for rows, columns in ((2, 1300), (1, 9000)):
        student, teacher = block(rows, columns, dtype)
        statistics = functions.row_statistics(student, teacher, transforms)
        coefficients = random_coefficients(rows, statistics.dtype)
        outs = [torch.empty_like(student) for _ in range(3)]
        functions.row_gradient(student, teacher, statistics, *coefficients, transforms, outs[0])
        functions.row_mixture_gradient(student, teacher, statistics, *coefficients, [0.1, 0.4], transforms, outs[1])
        gates = torch.full((rows,), 2.0, dtype=statistics.dtype)
        loss = functions.row_loss_and_gradient(student, teacher, gates, 0.8, [1.0, 0.0, 0.0, 1.0], transforms, outs[2])
        mixture = functions.row_mixture(student, teacher, statistics, [0.1, 0.4], transforms)
        found += [statistics, mixture, *outs, *(loss if isinstance(loss, tuple) else [loss])]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_the_interpreters(dtype: torch.dtype) -> None:
    remembered = results(dtype, TRANSFORMS[3])
    with ExitStack() as stack:
        for owner, name, value in quick_interpreter.REPLACED:
            stack.enter_context(mock.patch.object(owner, name, value))
        plain = results(dtype, TRANSFORMS[3])
    for one, other in zip(remembered, plain, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other) and one.isfinite().all()
