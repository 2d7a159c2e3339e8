"""Loss, dX and dW against fp64 on the smallest vocabularies and the largest: the first thing to know of a GPU."""

from __future__ import annotations

import pytest
import torch

from eopd_kernels import entropy_aware_kl, reference
from tests.conftest import make_case, relative_error
from tests.gpu.conftest import moved
from tests.gpu.test_on_a_gpu import ROUNDING, solve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [5003, 50_257, 151_936])
def test_smoke(vocab_size: int, dtype: torch.dtype, on_gpu: str, cuda: torch.device) -> None:
    case = make_case(leading=(9,), vocab_size=vocab_size, dtype=dtype, masked=True)
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    ours = solve(entropy_aware_kl, moved(case, cuda), backend=on_gpu)
    for value, exact in zip(ours, truth, strict=True):
        assert value.isfinite().all() and relative_error(value.cpu(), exact) < 1e-4 + 3 * ROUNDING[value.dtype]
