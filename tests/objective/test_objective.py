"""Options, their checks, and the coefficients they give a row."""

import math
from typing import Any

import pytest
import torch

from eopd_kernels import EntropyGate, Objective
from eopd_kernels.inputs.record import Tokens
from eopd_kernels.row_math.formulas import gated_coefficients, open_gate
from eopd_kernels.row_math.statistics import RowStatistics
from eopd_kernels.schedules.loss_terms import terms_of
from tests.row_math.test_statistics import pair


@pytest.fixture
def statistics() -> RowStatistics:
    return RowStatistics.of(*pair(6, 40))


def test_defaults_are_the_papers() -> None:
    objective = Objective()
    assert objective.gate == EntropyGate(0.8)
    assert (objective.alpha, objective.combine, objective.temperature) == (1.0, "add", 1.0)


def test_the_gate_opens_strictly_above_the_threshold(statistics: RowStatistics) -> None:
    entropy = statistics.teacher_entropy
    at = float(entropy.median())
    assert torch.equal(open_gate(statistics, at), (entropy > at).double())
    assert open_gate(statistics, at).sum() == 3  # of six rows, not the one at the threshold itself


@pytest.mark.parametrize(
    ("objective", "closed", "open_"),
    [
        (Objective(alpha=0.5), (1.0, 0.0), (1.0, 0.5)),
        (Objective(alpha=0.5, combine="switch"), (1.0, 0.0), (0.0, 0.5)),
        (Objective(gate="always", alpha=0.5), None, (1.0, 0.5)),
        (Objective.reverse_kl(), (1.0, 0.0), None),
        (Objective.forward_kl(), None, (0.0, 1.0)),
        (Objective(alpha=0.5, combine="blend", reverse_weight=3.0), (3.0, 0.0), (1.5, 0.5)),
        (Objective(temperature=2.0, temperature_squared=True, alpha=0.5), (4.0, 0.0), (4.0, 2.0)),
    ],
)
def test_weights_of_the_halves(
    objective: Objective,
    closed: tuple[float, float] | None,
    open_: tuple[float, float] | None,
    statistics: RowStatistics,
) -> None:
    gate = open_gate(statistics, objective.gate_threshold(40))
    assert closed is not None or (gate == 1).all()
    assert open_ is not None or (gate == 0).all()
    for value, expected in ((0.0, closed), (1.0, open_)):
        if expected is not None:
            c_r, c_f = objective.combination(torch.tensor([value]))
            assert (float(c_r), float(c_f)) == expected
            gates = torch.full((6,), value, dtype=torch.float64)
            loss = terms_of(objective, statistics, gates, Tokens()).loss
            torch.testing.assert_close(loss, expected[0] * statistics.reverse_kl + expected[1] * statistics.forward_kl)


def test_a_half_of_weight_zero_is_left_out_even_where_it_is_infinite() -> None:
    student, teacher = pair(3, 20)
    teacher[:, 4] = -math.inf
    statistics = RowStatistics.of(student, teacher)
    objective = Objective.forward_kl()
    gate, upstream = torch.ones(3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
    assert (statistics.reverse_kl == math.inf).all()
    loss = terms_of(objective, statistics, gate, Tokens()).loss
    torch.testing.assert_close(loss, statistics.forward_kl)
    a, b, c = gated_coefficients(statistics, gate, objective.combination, upstream)
    assert (a == 0.3).all() and (b == 0).all() and (c == 0.3).all()


def test_coefficients_of_a_row(statistics: RowStatistics) -> None:
    gate = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.float64)
    upstream = torch.tensor([0.5, -1.5, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    a, b, c = gated_coefficients(statistics, gate, Objective(alpha=0.25).combination, upstream)
    torch.testing.assert_close(a, upstream * (0.25 * gate - statistics.reverse_kl))
    torch.testing.assert_close(b, upstream)
    torch.testing.assert_close(c, upstream * 0.25 * gate)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: EntropyGate(math.nan), ValueError, "EntropyGate.threshold must be a finite number, got nan"),
        (lambda: EntropyGate(math.inf), ValueError, "EntropyGate.threshold"),
        (lambda: EntropyGate("high"), TypeError, "EntropyGate.threshold must be a number, got 'high'"),  # type: ignore[arg-type]
        (lambda: EntropyGate(True), TypeError, "EntropyGate.threshold"),
        (lambda: Objective(alpha=math.inf), ValueError, "Objective.alpha"),
        (lambda: Objective(alpha=-0.5), ValueError, "Objective.alpha must be a finite number of at least 0, got -0.5"),
        (
            lambda: Objective(temperature=0.0),
            ValueError,
            "Objective.temperature must be a finite number above 0, got 0.0",
        ),
        (lambda: Objective(temperature=math.nan), ValueError, "Objective.temperature"),
        (lambda: Objective(combine="mix"), ValueError, "Objective.combine must be one of"),  # type: ignore[arg-type]
        (lambda: Objective(gate=0.8), TypeError, "Objective.gate must be an EntropyGate"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused_by_name(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(")):
        make()
