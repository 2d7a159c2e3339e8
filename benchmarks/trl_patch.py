"""What patch_trl saves: trl's own functions, patched and not, on the same hidden states.

python -m benchmarks.trl_patch [--tokens N] [--vocabulary V] [--hidden D] [--seconds S]
"""

from __future__ import annotations

import argparse
import importlib
from contextlib import nullcontext

import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from eopd_kernels.integrations.trl import patch_trl

from .measure import MIB, fresh_process, interleaved, peak_memory
from .peers.trl import gkd
from .problems import HiddenProblem, hidden_problem
from .steps import Step, gradients, of_loss


def divergence_step(problem: HiddenProblem, patched: bool) -> Step:
    """The loss part of DistillationTrainer's step at β = 1: heads, divergence, gradients."""
    trainer = importlib.import_module("trl.trainer.distillation_trainer")
    batched = [t.unsqueeze(0) for t in (problem.student, problem.teacher)]
    weights = problem.student_weight, problem.teacher_weight
    mask = torch.ones(1, len(problem.student))

    def step() -> object:
        with patch_trl(Objective.reverse_kl()) if patched else nullcontext():
            loss, _, _ = trainer._chunked_divergence_loss(*batched, *weights, mask, 1.0)
            return gradients(loss, *problem.leaves)

    return step


def ours(problem: HiddenProblem) -> Tensor:
    return entropy_aware_kl(
        problem.student,
        problem.teacher,
        student_head=LMHead(problem.student_weight),
        teacher_head=LMHead(problem.teacher_weight),
        objective=Objective.reverse_kl(),
    ).loss


def theirs(problem: HiddenProblem) -> Tensor:
    """Both heads, then GKDTrainer's generalized_jsd_loss, as its trainer does."""
    return gkd(problem, 1.0)


def loss_memory(tokens: int, vocabulary: int, hidden: int, of_trl: bool) -> int:
    """Bytes at most beyond the inputs while the loss and its gradients are computed; for a process of its own."""
    loss = theirs if of_trl else ours
    of_loss(loss, hidden_problem(64, 100, hidden))()  # libraries and thread pools load on first use
    return peak_memory(of_loss(loss, hidden_problem(tokens, vocabulary, hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_patch", description=__doc__)
    for name, default in (("tokens", 1024), ("vocabulary", 49_152), ("hidden", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    shape = options.tokens, options.vocabulary, options.hidden
    theirs_mib, ours_mib = (fresh_process(loss_memory, *shape, of_trl) / MIB for of_trl in (True, False))
    memory = f"generalized_jsd_loss {theirs_mib:.0f} MiB, ours {ours_mib:.0f} MiB, {theirs_mib / ours_mib:.1f}x less"
    print(f"peak memory of the loss: {memory}")
    problem = hidden_problem(*shape)
    steps = {name: divergence_step(problem, name == "patched") for name in ("unpatched", "patched")}
    times = interleaved(steps, options.seconds)
    faster = times["unpatched"] / times["patched"]
    print(f"DistillationTrainer's loss: unpatched {times['unpatched']}, patched {times['patched']}, {faster} faster")


if __name__ == "__main__":
    main()
