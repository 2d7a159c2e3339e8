"""orda-kernel: on a GPU its Triton kernels, elsewhere its torch path, which has all logits in memory."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..problems import HiddenProblem


def distillation_loss(problem: HiddenProblem, divergence: str) -> Tensor:
    """Its "entropy_adaptive" blends forward and reverse KL by a sigmoid of H_teacher / log V, not by a hard gate."""
    package = importlib.import_module("orda_kernel")
    labels = torch.zeros(len(problem.student), dtype=torch.long, device=problem.student.device)
    output = package.distillation_loss(
        problem.student,
        problem.student_weight,
        labels,
        package.SeparateTeacher(problem.teacher, problem.teacher_weight),
        student_ce_weight=0.0,
        kl_weight=1.0,
        kl_divergence=divergence,
        backend="triton" if problem.student.is_cuda else "torch",
    )
    return output.loss
