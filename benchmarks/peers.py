"""The losses of other packages, each as its users call it on hidden states, where the package is installed.

None computes the same thing, both divergences under a hard entropy gate; what each computes is said beside it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problems import HiddenProblem


@dataclass(frozen=True)
class Peer:
    """A loss of another package.

    Args:
        name: as in the tables.
        package: the distribution it comes with.
        divergence: what it computes; "reverse", "forward", "jsd" are those of :mod:`benchmarks.gpu.truth`.
        loss: the mean over tokens.
    """

    name: str
    package: str
    divergence: str
    loss: Callable[[HiddenProblem], Tensor]

    @property
    def version(self) -> str | None:
        """The version installed, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def trl(beta: float) -> Callable[[HiddenProblem], Tensor]:
    def loss(problem: HiddenProblem) -> Tensor:
        module = importlib.import_module("trl.kernels.chunked_divergence")
        divergence, _ = module.ChunkedDivergenceFunction.apply(
            problem.student, problem.student_weight, None, problem.teacher, problem.teacher_weight, None, beta
        )
        return divergence.mean()

    return loss


def liger(problem: HiddenProblem) -> Tensor:
    """With its default: dW accumulated in the head's dtype."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_jsd")
    return module.LigerFusedLinearJSDFunction.apply(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, None, 0.5
    )


def fla(problem: HiddenProblem) -> Tensor:
    module = importlib.import_module("fla.modules.fused_kl_div")
    return module.fused_kl_div_loss(problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)


def orda(divergence: str) -> Callable[[HiddenProblem], Tensor]:
    def loss(problem: HiddenProblem) -> Tensor:
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
            backend="triton",
        )
        return output.loss

    return loss


PEERS = [
    Peer("trl chunked_divergence, reverse KL", "trl", "reverse", trl(1.0)),
    Peer("trl chunked_divergence, JSD", "trl", "jsd", trl(0.5)),
    Peer("Liger fused linear JSD", "liger-kernel", "jsd", liger),
    Peer("orda reverse KL", "orda-kernel", "reverse", orda("reverse")),
    Peer("orda entropy_adaptive", "orda-kernel", "soft entropy gate", orda("entropy_adaptive")),
    Peer("fla fused_kl_div, forward KL", "flash-linear-attention", "forward", fla),
]
