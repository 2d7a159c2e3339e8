"""What a spread vocabulary costs: bytes sent per token, memory per rank, and no waiting for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eopd_kernels import EntropyGate, LMHead, Objective, QuantileGate, Sampled, entropy_aware_kl
from eopd_kernels.testing import messages, pretend
from tests.conftest import Case
from tests.distributed.processes import run_ranks
from tests.distributed.shards import SMALL, halves_of, solved
from tests.distributed.traffic import Traffic
from tests.test_objectives import case_of


def sent(case: Case, **options: Any) -> Traffic:
    """By one call of the loss and its backward, the exchange of the shards' sizes (once per call) apart."""
    with Traffic() as traffic:
        solved(case, tensor_parallel_group=dist.group.WORLD, **options)
    assert traffic.bytes["allgather_"] >= 32
    traffic.bytes["allgather_"] -= 32
    return traffic


def traffic_per_token() -> dict[str, float]:
    """Bytes per token that a rank puts in, all tokens valid, by what is asked for."""
    found = {}
    n, partial = 3 * 37, {"partial_hidden_gradient": True}
    for name, objective in {
        "default": Objective(),
        "sampled": Objective(reverse=Sampled()),
        "the paper's": replace(Objective.eopd_paper(), gate="always"),
        "jsd": Objective.jsd(),
        "no reverse half, open": Objective(gate=EntropyGate(-1.0), reverse="none"),
    }.items():
        case = case_of(objective)
        for schedule in ("chunked", "recompute"):
            found[f"{name}, {schedule}"] = (
                sum(sent(halves_of(case), schedule=schedule, **partial, **SMALL).bytes.values()) / n
            )
    found["token log-probabilities"] = (
        sum(sent(halves_of(case_of(Objective(), given=("token_ids",))), **partial).bytes.values()) / n
    )
    found["dX"] = sum(sent(halves_of(case_of(Objective())), **SMALL).bytes.values()) / n - found["default, chunked"]
    wide = case_of(Objective(), vocab_size=2 * 611)
    found["twice the vocabulary"] = sum(sent(halves_of(wide, [611, 611]), **partial).bytes.values()) / n
    masked = case_of(Objective(), masked=True)
    found["masked"] = sum(sent(halves_of(masked), **partial).bytes.values()) / float(masked.mask.sum())  # type: ignore[union-attr]
    return found


def test_bytes_per_token() -> None:
    for found in run_ranks(2, traffic_per_token):
        default, sampled = messages.vocabulary_forward_bytes(), messages.vocabulary_forward_bytes(sampled=True)
        assert (default, sampled) == (32, 40)
        for schedule in ("chunked", "recompute"):
            assert found[f"default, {schedule}"] == default
            assert found[f"sampled, {schedule}"] == sampled
            assert found[f"the paper's, {schedule}"] == sampled + messages.vocabulary_top_k_bytes(16)
            assert found[f"jsd, {schedule}"] == messages.vocabulary_forward_bytes(skewed=True)
            assert found[f"no reverse half, open, {schedule}"] == default + messages.TEACHER_FIRST_BYTES
        assert found["token log-probabilities"] == sampled
        assert found["dX"] == pytest.approx(messages.vocabulary_hidden_gradient_bytes(24))
        assert found["twice the vocabulary"] == found["masked"] == default


def waits_for_no_gpu() -> None:
    """After the first call, whose sizes the host has to read."""
    for objective in (Objective.eopd_paper(), Objective.jsd(), Objective(gate=QuantileGate(0.5), reverse="none")):
        part = halves_of(case_of(objective, masked=True, dtype=torch.bfloat16))
        options: dict[str, Any] = {"tensor_parallel_group": dist.group.WORLD, "wait_free": True}
        options["num_items"] = torch.tensor(7.0)
        upstream = torch.ones(())
        with pretend.gpu():
            for watch in (torch.no_grad(), pretend.Watch()):
                with watch:
                    out = entropy_aware_kl(part.student, part.teacher, **part.arguments, **options)
                    if out.loss.requires_grad:
                        torch.autograd.grad(out.loss, part.leaves, upstream)


def test_the_host_waits_for_no_gpu() -> None:
    run_ranks(2, waits_for_no_gpu)


def peak_memory(vocab_size: int = 8192, n: int = 256, dim: int = 32) -> tuple[int, int]:
    """The bytes that a step allocates at its peak with this rank's part of the vocabulary; and those of dW."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, dim, generator=generator), torch.randn(vocab_size, dim, generator=generator)
    mine = weight[: vocab_size // dist.get_world_size()].clone().requires_grad_()
    head, x = LMHead(mine), hidden.clone().requires_grad_()
    with pretend.PeakMemory() as meter:
        out = entropy_aware_kl(
            x,
            hidden,
            student_head=head,
            teacher_head=LMHead(mine.detach()),
            tensor_parallel_group=dist.group.WORLD,
        )
        out.loss.backward()
    return meter.peak, mine.nbytes


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_falls_with_the_ranks(ranks: int) -> None:
    """Both are divided: the blocks, which are one chunk's here, and dW, which takes the place of the teacher's."""
    blocks, weight = 2 * 256 * 8192 * 4, 8192 * 32 * 4
    for peak, own_weight in run_ranks(ranks, peak_memory):
        assert own_weight == weight / ranks
        assert peak == pytest.approx(max(blocks, blocks / 2 + weight) / ranks, rel=0.02)
