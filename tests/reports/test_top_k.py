"""Divergences over a few entries, and teachers of which no more is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels import Objective, Sampled, TopK, TopKTeacher, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, solved


def only(half: TopK) -> Objective:
    """The forward half on every token and nothing else."""
    return Objective(gate="always", reverse="none", forward=half)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_a_truncated_divergence_below_0_is_shown_as_it_is() -> None:
    """verl-project/verl#7806: 0.6·log(0.6/0.9) = −0.243279, there of a reverse KL, was clamped to 0, and its gradient
    with it."""
    student, teacher = logits_of(0.9, 0.1), logits_of(0.6, 0.4)
    loss, ours = solved(student, teacher, 1.0, objective=only(TopK(1, teacher="raw")))
    assert abs(float(loss) - -0.243279) < 1e-6
    close(ours, torch.tensor([[0.6 * 0.9 - 0.6, 0.6 * 0.1]]))  # q_top·p − q on the top


def test_the_tail_makes_it_a_divergence() -> None:
    """verl-project/verl#7856: negative wherever the student has more mass in the top k than the teacher, clamped in 89
    % of the steps, and blind to the tail."""
    student, teacher = logits_of(0.9, 0.05, 0.05), logits_of(0.6, 0.3, 0.1)
    loss, ours = solved(student, teacher, 1.0, objective=only(TopK(1, teacher="raw", tail=True)))
    truth = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    assert truth > 0 and abs(float(loss) - truth) < 1e-6
    # Of p on the top: −q/p + (1 − q)/(1 − p), times dp/dz.
    slope = -0.6 / 0.9 + 0.4 / 0.1
    p = torch.tensor([0.9, 0.05, 0.05])
    close(ours, slope * 0.9 * (torch.tensor([[1.0, 0.0, 0.0]]) - p))


def test_a_token_at_the_clamp_still_learns() -> None:
    """verl-project/verl#7855: clamp_min(0) over tokens left those without a gradient that had the wrong sign."""
    teacher = normal(40, 60, seed=2)
    student = torch.linspace(0.6, 1.6, 40).unsqueeze(1) * teacher + 0.1 * normal(40, 60, seed=1)
    leaf = student.requires_grad_()
    out = entropy_aware_kl(leaf, teacher, objective=only(TopK(4, teacher="raw")), reduction="none")
    below = out.loss < 0
    rows = torch.autograd.grad(out.loss.sum(), leaf)[0].abs().amax(1)
    assert 0 < below.sum() < 40 and (rows > 0).all()


def test_an_entry_that_is_listed_twice_counts_once() -> None:
    """vllm-project/vllm#36746: the sampled token stood before the top k and among them; ByteDance-Seed/VeOmni#771
    summed what it found twice."""
    ids = torch.tensor([[4, 9, 4, 2]])
    log_probs = torch.tensor([[-0.6, -1.4, -0.6, -3.0]])
    once = torch.tensor([True, True, False, True])
    objective = only(TopK(teacher="renormalized"))
    student = normal(1, 20)
    loss, ours = solved(student, TopKTeacher(ids, log_probs), objective=objective)
    leaf = student.double().requires_grad_()
    log_p = torch.log_softmax(leaf, 1)[0, ids[0, once]]
    log_q = torch.log_softmax(log_probs[0, once].double(), 0)
    truth = (log_q.exp() * (log_q - log_p)).sum()
    close(loss, truth)
    close(ours, gradient(truth, leaf))


@pytest.mark.parametrize("mark", ["id", "valid", "log_prob"])
def test_a_missing_entry_has_no_mass(mark: str) -> None:
    """verl-project/verl#7425: a fallback for what the server had not sent had to be kept out of the teacher's mass."""
    ids, log_probs = torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -1.2, -0.9]])
    valid = None
    if mark == "id":
        ids[0, 2] = -1
    if mark == "valid":
        valid = torch.tensor([[True, True, False]])
    if mark == "log_prob":
        log_probs[0, 2] = -math.inf
    student = normal(1, 10)
    objective = only(TopK(teacher="raw", tail=True))
    loss, ours = solved(student, TopKTeacher(ids, log_probs, valid=valid), objective=objective)
    leaf = student.double().requires_grad_()
    p, q = torch.softmax(leaf, 1)[0, 1:3], torch.tensor([-1.0, -1.2], dtype=torch.float64).exp()
    truth = (q * (q / p).log()).sum() + (1 - q.sum()) * ((1 - q.sum()) / (1 - p.sum())).log()
    close(loss, truth)
    close(ours, gradient(truth, leaf))


def test_log_probabilities_stay_with_their_tokens() -> None:
    """huggingface/trl#6191: with prompts of several lengths the rollout's log-probabilities met other positions'."""
    student, teacher = normal(2, 6, 12, seed=1), normal(2, 6, 12, seed=2)
    token_ids = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(0))
    log_p = torch.log_softmax(student.double(), -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    log_q = torch.log_softmax(teacher.double(), -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    mask = torch.arange(6) >= torch.tensor([[1], [3]])
    old = torch.where(mask, log_p, torch.nan).float()
    ids = torch.where(mask, token_ids, -100)
    objective = Objective(reverse=Sampled(), forward="none", gate="never")
    loss, _ = solved(
        student, teacher, objective=objective, mask=mask, token_ids=ids, old_log_probs=old, reduction="none"
    )
    close(loss, torch.where(mask, -(log_q - log_p), 0.0))


@pytest.mark.parametrize("half", ["forward", "reverse"])
def test_log_probabilities_that_a_server_has_rounded_add_up_to_more_than_1(half: str) -> None:
    """Found by the fuzz: q(S) = 1.0004 was cut to 1 for the teacher's tail, but not for what is made of it."""
    p, q = torch.tensor([[0.7, 0.2996, 0.0004]]), torch.tensor([[0.7501, 0.2503]])
    served, top = TopKTeacher(torch.tensor([[0, 1]]), q.log()), TopK(2, teacher="raw", tail=True)
    objective = Objective("always", **{"reverse": "none", "forward": "none", half: top})  # type: ignore[arg-type]
    leaf = p.double().log().requires_grad_()
    out = entropy_aware_kl(leaf, served, objective=objective)
    with_rest = torch.cat([q.double(), torch.full((1, 1), 2.0**-52)], 1)
    log_p, log_q = leaf.log_softmax(1), with_rest.log()
    truth = with_rest * (log_q - log_p) if half == "forward" else log_p.exp() * (log_p - log_q)
    close(getattr(out, f"{half}_half"), truth.sum(1))
    close(gradient(out.loss, leaf), gradient(truth.sum(), leaf))
