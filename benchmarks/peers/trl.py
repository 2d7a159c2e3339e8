"""trl: the tiled divergence of hidden states, and the loss of GKD's trainer, which has all logits in memory."""

from __future__ import annotations

import importlib

from torch import Tensor

from ..problems import HiddenProblem, LogitsProblem


def chunked_divergence(problem: HiddenProblem, beta: float) -> Tensor:
    """``beta`` 0 is its forward KL, 1 its reverse KL, and between them a generalised JSD."""
    module = importlib.import_module("trl.kernels.chunked_divergence")
    divergence, _ = module.ChunkedDivergenceFunction.apply(
        problem.student, problem.student_weight, None, problem.teacher, problem.teacher_weight, None, beta
    )
    return divergence.mean()


def gkd(problem: HiddenProblem, beta: float) -> Tensor:
    """The heads, then :func:`gkd_of_logits`: what a trainer does whose models return logits."""
    student = problem.student @ problem.student_weight.t()
    return gkd_of_logits(LogitsProblem(student, problem.teacher @ problem.teacher_weight.t()), beta)


def gkd_of_logits(problem: LogitsProblem, beta: float) -> Tensor:
    """``F.kl_div`` of log-softmaxes. Two dimensions: of three its "batchmean" would divide by the first alone."""
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    return trainer.generalized_jsd_loss(problem.student, problem.teacher, beta=beta)
