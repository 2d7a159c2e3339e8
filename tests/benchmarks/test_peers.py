"""Each peer computes what its adapter says, and ours beside it the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.contenders import ALL_OURS, COMPILED, HIDDEN, LOGITS, Contender
from benchmarks.problems import LogitsProblem, Shape, gradients, hidden_problem, logits_problem
from benchmarks.truth import OBJECTIVES, errors, truth

# Under torch.compile the plain code would compute the same half a minute later.
ON_HIDDEN = [i for i in HIDDEN.values() if i.loss is not None and i.objective in OBJECTIVES and i.name != COMPILED]
ON_LOGITS = [i for i in LOGITS.values() if i.loss is not None and i.name != COMPILED]


def agree(contender: Contender, problem: LogitsProblem) -> None:
    """Loss and gradients are the truth's."""
    if why := contender.refusal("cpu"):
        pytest.skip(why)
    assert contender.loss is not None
    loss = contender.loss(problem)
    found = errors(loss, gradients(loss, problem.leaves), truth(problem, contender.objective))
    assert max(e for e in found if e is not None) < 1e-4


@pytest.mark.parametrize("contender", ON_HIDDEN, ids=lambda i: i.name)
def test_on_hidden_states(contender: Contender) -> None:
    agree(contender, hidden_problem(Shape(40, 300, 16, 24)))


@pytest.mark.parametrize("contender", ON_LOGITS, ids=lambda i: i.name)
def test_on_logits(contender: Contender) -> None:
    agree(contender, logits_problem(24, 300))


def test_every_divergence_of_a_peer_has_a_truth_or_is_no_divergence() -> None:
    without = {i.objective for i in HIDDEN.values() if i.loss is not None and i.objective not in OBJECTIVES}
    assert without == {"cross-entropy, one head"}


def test_ours_is_there_under_each_of_the_names() -> None:
    assert [HIDDEN[name].objective for name in ALL_OURS] == ["gated", "reverse", "forward"]


def test_the_yardstick_is_cross_entropy() -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has no chunked linear_cross_entropy yet")
    problem = hidden_problem(Shape(40, 300, 16, 16))
    loss = HIDDEN["F.linear_cross_entropy, one head"].loss
    assert loss is not None
    logits = problem.student @ problem.student_weight.t()
    torch.testing.assert_close(loss(problem), cross_entropy(logits, torch.arange(40)))


def test_a_student_nearer_to_its_teacher_has_a_smaller_kl() -> None:
    far, near = (truth(hidden_problem(Shape(16, 200, 16, 16), noise=noise), "reverse").loss for noise in (0.3, 0.03))
    assert 0 < near < far / 20


def test_a_wider_teacher_has_logits_near_the_student_s() -> None:
    narrow, wide = (truth(hidden_problem(Shape(16, 200, 16, d)), "reverse").loss for d in (16, 64))
    assert wide < 3 * narrow
