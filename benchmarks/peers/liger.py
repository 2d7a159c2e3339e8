"""liger-kernel: its Triton kernel of the JSD, and its chunked loss in compiled PyTorch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..problems import HiddenProblem


def jsd(problem: HiddenProblem) -> Tensor:
    """With its default: dW accumulated in the head's dtype."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_jsd")
    return module.LigerFusedLinearJSDFunction.apply(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, None, 0.5
    )


def chunked_jsd(problem: HiddenProblem) -> Tensor:
    """At β = 1, which is KL(student‖teacher), without the half of cross-entropy that its default mixes in."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    loss = losses.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    labels = torch.zeros(len(problem.student), dtype=torch.long, device=problem.student.device)
    return loss(problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, labels)
