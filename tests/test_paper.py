"""The paper's objective from its equations (arXiv 2603.07079, Eq. 9 and 10, Alg. 1), written down token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl

V, D, K = 60, 8, 16
TAU, ALPHA, EPSILON = 0.8, 1.0, 0.2


def rollout(length: int, seed: int) -> dict[str, Tensor]:
    """One sequence: hidden states, a teacher's logits that are peaked on some tokens, y ~ p_old, log p_old(y)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sharpness = 8 * torch.rand(length, 1, generator=generator, dtype=torch.float64) ** 2
    return {
        "hidden": normal(length, D),
        "teacher": normal(length, V) * sharpness,
        "y": torch.randint(V, (length,), generator=generator),
        "noise": 0.4 * normal(length),
    }


def paper_loss(logits: Tensor, teacher: Tensor, y: int, old_log_prob: Tensor) -> Tensor:
    """The loss of one token."""
    log_p = logits - torch.logsumexp(logits, 0)
    log_q = teacher - torch.logsumexp(teacher, 0)
    entropy = -sum(math.exp(x) * x for x in log_q.tolist())
    advantage = float(log_q[y] - old_log_prob)
    ratio = torch.exp(log_p[y] - old_log_prob)
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - EPSILON, 1 + EPSILON))
    if entropy > TAU:
        top = sorted(range(V), key=lambda v: -float(log_q[v]))[:K]
        mass = sum(math.exp(float(log_q[v])) for v in top)
        for v in top:
            renormalized = math.exp(float(log_q[v])) / mass
            loss = loss + ALPHA * renormalized * (math.log(renormalized) - log_p[v])
    return loss


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("micro_batches", [[9, 4, 13], [26]], ids=["accumulated", "at once"])
def test_values_and_gradients_to_the_last_digits(micro_batches: list[int], schedule: str) -> None:
    """The denominator is every valid token of the step: the same whether its sequences come together or one by one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    expected_weight = weight.detach().clone().requires_grad_()
    total = sum(micro_batches)
    opened = clipped = 0
    loss, expected = 0.0, torch.zeros((), dtype=torch.float64)
    for seed, length in enumerate(micro_batches):
        one = rollout(length, seed)
        with torch.no_grad():
            log_p = torch.log_softmax(one["hidden"] @ weight.t(), 1)
            old = log_p.gather(1, one["y"].unsqueeze(1)).squeeze(1) + one["noise"]
        padded = {name: torch.cat([x, torch.full_like(x[:2], -1)]) for name, x in one.items()}
        mask = torch.arange(length + 2) < length
        out = entropy_aware_kl(
            padded["hidden"],
            padded["teacher"],
            student_head=LMHead(weight),
            objective=Objective.eopd_paper(),
            token_ids=padded["y"],
            old_log_probs=torch.cat([old, torch.zeros(2, dtype=torch.float64)]),
            mask=mask,
            num_items=total,
            schedule=schedule,
        )
        out.loss.backward()
        loss += float(out.loss.detach())
        opened += int(out.gate.sum())
        clipped += int(((log_p.gather(1, one["y"].unsqueeze(1)).squeeze(1) - old).exp() - 1).abs().gt(EPSILON).sum())
        logits = one["hidden"] @ expected_weight.t()
        expected = expected + sum(
            paper_loss(logits[i], one["teacher"][i], int(one["y"][i]), old[i]) for i in range(length)
        )
    (expected / total).backward()
    assert 3 < opened < total - 3 and 3 < clipped < total
    assert abs(loss - float(expected.detach()) / total) < 1e-9
    assert weight.grad is not None and expected_weight.grad is not None
    assert (weight.grad - expected_weight.grad).abs().max() < 1e-9
