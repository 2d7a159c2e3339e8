"""flash-linear-attention: the forward KL of hidden states, Triton only, logits in the inputs' dtype."""

from __future__ import annotations

import importlib

from torch import Tensor

from ..problems import HiddenProblem


def fused_kl_div(problem: HiddenProblem) -> Tensor:
    module = importlib.import_module("fla.modules.fused_kl_div")
    return module.fused_kl_div_loss(problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)
