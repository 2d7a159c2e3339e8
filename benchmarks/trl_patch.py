"""Measures what patch_trl saves: trl's own functions, patched and not, on the same hidden states.

python -m benchmarks.trl_patch [--tokens N] [--vocabulary V] [--hidden D] [--seconds S]
"""

from __future__ import annotations

import argparse
import importlib
from contextlib import nullcontext
from functools import partial

import torch

from eopd_kernels import Objective
from eopd_kernels.integrations.trl import patch_trl
from eopd_kernels.testing.processes import MIB

from .contenders import GKD, HIDDEN, OURS_REVERSE, Contender
from .problems import HiddenProblem, Shape, gradients, hidden_problem
from .records import Case, Record
from .run import run
from .steps import Step


def divergence_step(problem: HiddenProblem, patched: bool) -> Step:
    """The loss part of DistillationTrainer's step at β = 1: heads, divergence, gradients."""
    trainer = importlib.import_module("trl.trainer.distillation_trainer")
    batched = [t.unsqueeze(0) for t in (problem.student, problem.teacher)]
    weights = problem.student_weight, problem.teacher_weight
    mask = torch.ones(1, len(problem.student))

    def step() -> object:
        with patch_trl(Objective.reverse_kl()) if patched else nullcontext():
            loss, _, _ = trainer._chunked_divergence_loss(*batched, *weights, mask, 1.0)
            return gradients(loss, problem.leaves)

    return step


# GKDTrainer's loss behind both heads, and ours; DistillationTrainer's loss unpatched and patched.
LOSSES = (HIDDEN[GKD], HIDDEN[OURS_REVERSE])
TRAINERS = tuple(
    Contender(n, "reverse", prepare=partial(divergence_step, patched=n == "patched")) for n in ("unpatched", "patched")
)


def measured(shape: Shape, seconds: float, contenders: tuple[Contender, ...] = LOSSES + TRAINERS) -> list[Record]:
    source = partial(hidden_problem, shape)
    return run(Case("trl", str(shape), source, contenders, shape, error_tokens=0, seconds=seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_patch", description=__doc__)
    for name, default in (("tokens", 1024), ("vocabulary", 49_152), ("hidden", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    shape = Shape(options.tokens, options.vocabulary, options.hidden, options.hidden)
    records = measured(shape, options.seconds)
    theirs_mib, ours_mib = ((record.peak_bytes or 0) / MIB for record in records[:2])
    memory = f"generalized_jsd_loss {theirs_mib:.0f} MiB, ours {ours_mib:.0f} MiB, {theirs_mib / ours_mib:.1f}x less"
    print(f"peak memory of the loss: {memory}")
    unpatched, patched = (record.time for record in records[2:])
    assert unpatched is not None and patched is not None, [record.failure for record in records]
    print(f"DistillationTrainer's loss: unpatched {unpatched}, patched {patched}, {unpatched / patched} faster")


if __name__ == "__main__":
    main()
