"""Which divergence, in which direction, times what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eopd_kernels import Objective, Sampled
from tests.reports.plain import close, gradient, normal, plain, solved

# Two classes, by hand: the teacher q = (0.9, 0.1), the student p = (0.5, 0.5).
TEACHER, STUDENT = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
FORWARD = 0.368064  # 0.9·log(0.9/0.5) + 0.1·log(0.1/0.5)
REVERSE = 0.510826  # 0.5·log(0.5/0.9) + 0.5·log(0.5/0.1)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (Objective.forward_kl(), FORWARD),
        (Objective.reverse_kl(), REVERSE),
        (Objective.gkd(0.0), FORWARD),
        (Objective.gkd(1.0), REVERSE),
        (Objective.minillm_token(), REVERSE),
        (Objective.jeffreys(), FORWARD + REVERSE),
    ],
)
def test_the_direction_is_what_the_name_says(objective: Objective, value: float) -> None:
    """paiml/aprender#2153: a "forward KL" that was KL(student ‖ teacher); huggingface/trl#5731 and idanshen/Self-
    Distillation#5: a default that meant the other one; THUDM/slime#2254: documented the wrong way round."""
    loss, ours = solved(STUDENT, TEACHER, 1.0, objective=objective)
    assert abs(float(loss) - value) < 1e-6
    by_hand = {FORWARD: -0.4, REVERSE: -0.549306, FORWARD + REVERSE: -0.949306}[value]  # p − q; p·(log p/q − R)
    close(ours, torch.tensor([[by_hand, -by_hand]]))


def test_the_default_keeps_the_reverse_half_and_opens_the_forward_one_above_its_threshold() -> None:
    """huggingface/trl#5731's kind: what is minimised where nothing was said. H(0.9, 0.1) = 0.325 nats is below 0.8."""
    loss, _ = solved(STUDENT, TEACHER)
    assert abs(float(loss) - REVERSE) < 1e-6
    wide = torch.zeros(1, 8)  # log 8 = 2.08 nats
    kls = plain(normal(1, 8), wide)
    close(solved(normal(1, 8), wide)[0], (kls.reverse_kl + kls.forward_kl).mean())


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_square_of_the_temperature(name: str, temperature: float) -> None:
    """IntelLabs/distiller#122, keras-team/keras-io#869: the factor T² was left out; NVIDIA-NeMo/Automodel#1499 added it
    later. Here it is asked for, and never there twice."""
    student, teacher = normal(5, 30, seed=1), normal(5, 30, seed=2)
    leaf = student.double().requires_grad_()
    truth = getattr(plain(leaf, teacher, temperature), name).mean()
    expected = gradient(truth, leaf)
    half = {"forward": "none"} if name == "reverse_kl" else {"reverse": "none"}
    for squared, factor in ((False, 1.0), (True, temperature**2)):
        objective = Objective("always", temperature=temperature, temperature_squared=squared, **half)  # type: ignore[arg-type]
        loss, ours = solved(student, teacher, objective=objective)
        close(loss, factor * truth)
        close(ours, factor * expected, 1e-4)


def test_with_the_square_a_gradient_keeps_its_size() -> None:
    """huggingface/transformers#1181, #12299: what T² is for: without it the gradient falls with 1/T²."""
    student, teacher = normal(5, 30, seed=1, scale=1.0), normal(5, 30, seed=2, scale=1.0)

    def size(squared: bool) -> Tensor:
        objective = Objective("always", temperature=20.0, temperature_squared=squared, reverse="none")
        return solved(student, teacher, 1.0, objective=objective)[1].norm()

    # For large T it is the mean square of centred logits: (z_s − z_t) / V of each entry.
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert abs(size(True) / (centred / 30 / 5).norm() - 1) < 0.1 and size(False) < size(True) / 300


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_generalised_jsd(beta: float) -> None:
    """modelscope/ms-swift#10078, huggingface/trl#6780: which weight belongs to which divergence. GKD's Eq. 1:
    β·KL(q ‖ m) + (1 − β)·KL(p ‖ m) with m = β·q + (1 − β)·p; linkedin/Liger-Kernel#278 on its ends."""
    student, teacher = normal(6, 25, seed=1), normal(6, 25, seed=2)
    leaf = student.double().requires_grad_()
    p, q = leaf.softmax(1), teacher.double().softmax(1)
    m = beta * q + (1 - beta) * p
    truth = (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(1).mean()
    loss, ours = solved(student, teacher, objective=Objective.gkd(beta))
    close(loss, truth)
    close(ours, gradient(truth, leaf))


@pytest.mark.parametrize("skew", [0.1, 0.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradients_of_skewed_divergences(reverse: bool, skew: float) -> None:
    """jongwooko/distillm#18: the published gradients of the reverse and skewed KLs have another sign than their
    derivation."""
    student, teacher = normal(6, 25, seed=1), normal(6, 25, seed=2)
    leaf = student.double().requires_grad_()
    p, q = leaf.softmax(1), teacher.double().softmax(1)
    own, other = (p, q) if reverse else (q, p)
    truth = (own * (own / (skew * own + (1 - skew) * other)).log()).sum(1).mean()
    objective = Objective.skewed_reverse_kl(skew) if reverse else Objective.skewed_forward_kl(skew)
    loss, ours = solved(student, teacher, objective=objective)
    close(loss, truth)
    close(ours, gradient(truth, leaf))


def test_the_advantage_is_a_constant() -> None:
    """meta-pytorch/torchforge#527: log p − log q was not detached and was differentiated as well. At p = p_old the
    gradient is −A·(1[v = y] − p_v)."""
    student, teacher = normal(5, 12, seed=1), normal(5, 12, seed=2)
    y = torch.tensor([0, 3, 11, 7, 7])
    log_p, log_q = (t.double().log_softmax(1) for t in (student, teacher))
    old = log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    advantage = log_q.gather(1, y.unsqueeze(1)).squeeze(1) - old
    objective = Objective(reverse=Sampled(), forward="none", gate="never")
    _, ours = solved(
        student, teacher, 1.0, objective=objective, token_ids=y, old_log_probs=old.float(), reduction="sum"
    )
    truth = -advantage.unsqueeze(1) * (torch.nn.functional.one_hot(y, 12) - log_p.exp())
    close(ours, truth)


def test_no_entry_s_share_is_clipped() -> None:
    """huggingface/trl#5990: entries were clipped from above before they were summed, where some are negative: a loss
    below 0 that pushes the student away."""
    teacher, student = torch.tensor([[0.9] + 9 * [0.1 / 9]]).log(), torch.tensor([[0.2] + 9 * [0.8 / 9]]).log()
    loss, _ = solved(student, teacher, objective=Objective.forward_kl())
    entries = teacher.double().exp() * (teacher - student).double()
    assert entries.clamp(max=0.05).sum() < -0.1
    close(loss, entries.sum())
