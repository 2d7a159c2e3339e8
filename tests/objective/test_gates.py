"""Gates: their values, what they need to have seen, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eopd_kernels import EntropyGate, Objective, QuantileGate, RowStatistics, entropy_aware_kl
from eopd_kernels.objective.gates import gate_values, needs_every_row, needs_student
from tests.conftest import make_case
from tests.row_math.test_statistics import pair


@pytest.fixture
def statistics() -> RowStatistics:
    return RowStatistics.of(*pair(8, 40))


def test_the_entropy_of_each_side_in_each_unit(statistics: RowStatistics) -> None:
    for of, h in (("teacher", statistics.teacher_entropy), ("student", statistics.student_entropy)):
        at = float(h.median())
        hard = EntropyGate(at, of=of)  # type: ignore[arg-type]
        assert torch.equal(hard(statistics, 40), (h > at).double())
        relative = EntropyGate(at / math.log(40), of=of, normalized=True)  # type: ignore[arg-type]
        assert (
            relative(statistics, 40) == (h > at).double()
        ).sum() >= 7  # of 8: the median itself may round either way
        soft = EntropyGate(at, of=of, sharpness=3.0)  # type: ignore[arg-type]
        torch.testing.assert_close(soft(statistics, 40), torch.sigmoid(3 * (h - at)))
        both = EntropyGate(0.3, of=of, sharpness=3.0, normalized=True)  # type: ignore[arg-type]
        torch.testing.assert_close(both(statistics, 40), torch.sigmoid(3 * (h / math.log(40) - 0.3)))


def test_one_entry_has_no_entropy_to_normalize() -> None:
    one = RowStatistics.of(torch.zeros(3, 1), torch.zeros(3, 1))
    assert (EntropyGate(0.5, normalized=True)(one, 1) == 0).all()
    assert EntropyGate(0.5, normalized=True, sharpness=2.0)(one, 1).isfinite().all()


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.8, 1.0])
def test_a_quantile_opens_its_share_of_the_valid_tokens(statistics: RowStatistics, quantile: float) -> None:
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 2, 0.5], dtype=torch.float64)
    packed = statistics.packed.clone()
    packed[weights == 0] = math.inf  # whatever a masked token holds
    gate = gate_values(QuantileGate(quantile), RowStatistics(packed), 40, weights)
    valid = statistics.teacher_entropy[weights != 0]
    assert torch.equal(gate[weights != 0], (valid > valid.quantile(quantile)).double())
    assert (gate[weights == 0] == 0).all()
    assert len(gate_values(QuantileGate(), RowStatistics(packed[:0]), 40, weights[:0])) == 0


def test_a_masked_token_has_a_shut_gate(statistics: RowStatistics) -> None:
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 2, 0.5], dtype=torch.float64)
    for gate in (
        "always",
        EntropyGate(-1.0),
        EntropyGate(sharpness=1.0),
        QuantileGate(0.0),
        lambda s: s.teacher_max * 0 + 1,
    ):
        values = gate_values(gate, statistics, 40, weights)
        assert (values[weights == 0] == 0).all() and values.sum() > 0


def test_a_users_gate_sees_every_token_once_and_no_gradient() -> None:
    case = make_case(masked=True)
    assert case.mask is not None
    seen = []

    def gate(statistics: RowStatistics) -> torch.Tensor:
        seen.append(statistics)
        return statistics.reverse_kl.nan_to_num().requires_grad_() > 1

    out = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "objective": Objective(gate=gate)})
    assert len(seen) == 1
    known = ~seen[0].teacher_entropy.isnan()
    assert torch.equal(known.view(case.mask.shape), case.mask)
    assert torch.equal(out.gate.bool(), (out.reverse_kl > 1) & case.mask)
    out.loss.backward()


def test_a_given_gate_replaces_the_objectives() -> None:
    case = make_case(masked=True)
    assert case.mask is not None
    given = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(0))
    for objective in (Objective(), Objective(gate=QuantileGate()), Objective(gate="never")):
        arguments = {**case.arguments, "objective": objective}
        out = entropy_aware_kl(case.student, case.teacher, **arguments, gate=given, schedule="chunked")
        torch.testing.assert_close(out.gate, given * case.mask)


@pytest.mark.parametrize("gate", [QuantileGate(), lambda statistics: statistics.teacher_entropy])
def test_a_gate_that_looks_across_tokens_takes_the_schedule_that_lets_it(gate: Any) -> None:
    case = make_case()
    arguments = {**case.arguments, "objective": Objective(gate=gate)}
    with pytest.raises(
        ValueError, match="schedule='chunked' takes the gradient before every token's statistics are known"
    ):
        entropy_aware_kl(case.student, case.teacher, **arguments, schedule="chunked")
    assert needs_every_row(gate) and not needs_every_row(EntropyGate(sharpness=2.0)) and not needs_every_row("always")


def test_which_gates_look_at_the_student() -> None:
    assert [needs_student(g) for g in ("always", EntropyGate(), QuantileGate(), EntropyGate(of="student"))] == [
        False,
        False,
        False,
        True,
    ]
    assert needs_student(QuantileGate(of="student")) and needs_student(lambda statistics: statistics.student_max)


@pytest.mark.parametrize(
    ("gate", "error", "says"),
    [
        (lambda s: 1.0, TypeError, "a callable gate must return a tensor of real numbers, got float"),
        (lambda s: s.packed, ValueError, r"a callable gate must return one number per row, \[111\], got \[111, 8\]"),
    ],
)
def test_what_a_users_gate_must_return(gate: Any, error: type[Exception], says: str) -> None:
    case = make_case()
    with pytest.raises(error, match=says):
        entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "objective": Objective(gate=gate)})
