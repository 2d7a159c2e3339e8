"""print(objective): its formula."""

from __future__ import annotations

import pytest
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, QuantileGate, RowStatistics, Sampled, Skewed, TopK


def mine(statistics: RowStatistics) -> Tensor:
    return statistics.teacher_entropy


@pytest.mark.parametrize(
    ("objective", "lines"),
    [
        (Objective(), ["L = R + g·F", "R = KL(p ‖ q)", "F = KL(q ‖ p)", "g = 1[H_teacher > 0.8]"]),
        (Objective(gate="always", alpha=0.5, reverse_weight=2.0), ["L = 2·R + 0.5·F"]),
        (Objective(combine="switch", alpha=0.5), ["L = (1 − g)·R + 0.5·g·F"]),
        (Objective(combine="switch", gate="always"), ["L = F"]),
        (Objective(combine="blend", alpha=0.25), ["L = (1 − 0.25·g)·R + 0.25·g·F"]),
        (Objective(combine="blend", alpha=0.25, gate="always"), ["L = 0.75·R + 0.25·F"]),
        (Objective.reverse_kl(2.0), ["L = R", "p = softmax(z_student / 2), q = softmax(z_teacher / 2)"]),
        (Objective.forward_kl(), ["L = F"]),
        (Objective.jsd(0.3), ["L = 0.7·R + 0.3·F", "R = KL(p ‖ 0.7·p + 0.3·q)", "F = KL(q ‖ 0.3·q + 0.7·p)"]),
        (Objective(temperature=2.0, temperature_squared=True), ["L = 4·(R + g·F)"]),
        (Objective(temperature=2.0, temperature_squared=True, gate="always", reverse="none"), ["L = 4·F"]),
        (Objective(reverse=Sampled(0.1, 0.3), forward="none"), ["L = R", "clip(r, 0.9, 1.3)"]),
        (Objective(reverse=Sampled(clip_most=3.0), forward="none"), ["L = R", "at most −3·A where A < 0"]),
        (
            Objective(forward=TopK(8, teacher="raw", tail=True)),
            ["F = Σ_S q·log(q/p) + (1 − q(S))·log((1 − q(S))/(1 − p(S))), S = the teacher's 8 likeliest"],
        ),
        (Objective(forward=TopK(student="renormalized")), ["Σ_S q̃·log(q̃/p̃)", "q̃ = q/q(S), p̃ = p/p(S)"]),
        (Objective(gate=EntropyGate(0.4, of="student", normalized=True)), ["g = 1[H_student / log V > 0.4]"]),
        (Objective(gate=EntropyGate(0.4, sharpness=3.0)), ["g = sigmoid(3·(H_teacher − 0.4))"]),
        (Objective(gate=QuantileGate(0.9)), ["g = 1[H_teacher > its 0.9-quantile in the batch]"]),
        (Objective(gate=mine, reverse=Skewed(0.2)), ["g = mine(statistics)", "R = KL(p ‖ 0.2·p + 0.8·q)"]),
        (Objective(reverse="none", gate="never"), ["L = 0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_formula(objective: Objective, lines: list[str]) -> None:
    text = str(objective)
    assert text.splitlines()[0] == lines[0] or lines[0] in text.split("\n", 1)[1]
    assert all(line in text for line in lines)
    assert ("  R =" in text) == ("R" in text.splitlines()[0])
    assert ("  F =" in text) == ("F" in text.splitlines()[0])
    assert ("  g =" in text) == ("g" in text.splitlines()[0])
