"""Contenders and problems for the tests of the harness: known memory, known failures, nothing computed."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.problems import HiddenProblem, Shape, hidden_problem
from benchmarks.records import Case
from eopd_kernels.testing.processes import MIB

SHAPE = Shape(tokens=16, vocab=64, student_dim=8, teacher_dim=8)
HELD = 96 * MIB


def problem() -> HiddenProblem:
    return hidden_problem(SHAPE)


def small(problem: HiddenProblem) -> Tensor:
    """A loss with both gradients."""
    return (problem.student @ problem.student_weight.t()).logsumexp(-1).mean()


def holding(problem: HiddenProblem) -> Tensor:
    """A loss that keeps HELD bytes in memory meanwhile."""
    block = torch.ones(HELD, dtype=torch.uint8)
    return small(problem) + 0 * block[0]


def broken(problem: HiddenProblem) -> Tensor:
    raise RuntimeError("wants a | GPU\nand more")


def breaking_at_the_third(problem: HiddenProblem) -> Tensor:
    """Runs when it is prepared and when its memory is measured; not when it is timed."""
    calls.append(None)
    return small(problem) if len(calls) < 3 else broken(problem)


calls: list[None] = []


def dying(problem: HiddenProblem) -> Tensor:
    os._exit(7)


def greedy(problem: HiddenProblem) -> Tensor:
    return torch.empty(2**42, dtype=torch.uint8).sum()


def sleeping(problem: HiddenProblem) -> Tensor:
    if len(problem.student) == SHAPE.tokens:
        time.sleep(60)
    return small(problem)


def no_problem() -> HiddenProblem:
    raise ValueError("there are no inputs")


FAKES = {
    name: Contender(name, "words", loss)
    for name, loss in {
        "small": small,
        "holding": holding,
        "broken": broken,
        "breaking at the third": breaking_at_the_third,
        "dying": dying,
        "greedy": greedy,
        "sleeping": sleeping,
    }.items()
}
FAKES["missing"] = Contender("missing", "words", small, package="no-such-package")
FAKES["for GPUs"] = Contender("for GPUs", "words", small, gpu_only=True)


def case(*names: str, limit: float = 60.0) -> Case:
    return Case(
        "group",
        "a case",
        problem,
        tuple(FAKES[name] for name in names),
        SHAPE,
        error_tokens=4,
        seconds=0.0,
        limit=limit,
    )
