"""Every kind of half and gate on real hardware: as exact as the specification, and without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eopd_kernels import EntropyGate, Objective, QuantileGate, entropy_aware_kl, reference
from tests.conftest import relative_error
from tests.gpu.conftest import moved
from tests.gpu.test_on_a_gpu import ROUNDING, no_synchronisation, solve
from tests.test_objectives import TELLING_HALVES, case_of

pytestmark = pytest.mark.gpu
GATES = [EntropyGate(2.0), EntropyGate(2.0, of="student", sharpness=1.5), QuantileGate(0.6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize(("reverse", "forward"), TELLING_HALVES, ids=str)
def test_as_exact_as_the_specification(
    reverse: Any, forward: Any, gate: Any, dtype: torch.dtype, on_gpu: str, cuda: torch.device
) -> None:
    objective = Objective(gate=gate, alpha=0.7, reverse=reverse, forward=forward)
    case = case_of(objective, masked=True, bias=True, dtype=dtype, vocab_size=5003)
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    there = moved(case, cuda)
    num_items = torch.tensor(77.0, device=cuda)
    options: dict[str, Any] = {"num_items": num_items, "backend": on_gpu, "wait_free": True}
    solve(entropy_aware_kl, there, **options)  # what is compiled or loaded at the first call may wait
    with no_synchronisation():
        entropy_aware_kl(there.student, there.teacher, **there.arguments, **options)
    ours = solve(entropy_aware_kl, there, backend=on_gpu)
    assert relative_error(ours[0].cpu(), truth[0]) < 1e-4
    for value, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(value.cpu(), exact) < 1e-4 + 3 * ROUNDING[dtype]
