"""The losses of other packages, each as its users call it, where the package is installed.

None of them computes both divergences under a hard entropy gate; each docstring says what its function computes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from .problems import HiddenProblem, LogitsProblem


def no_labels(problem: HiddenProblem) -> Tensor:
    """Returns a label for each token, for losses that ask for labels and do not use them."""
    return torch.zeros(len(problem.student), dtype=torch.long, device=problem.student.device)


def trl_chunked_divergence(problem: HiddenProblem, beta: float) -> Tensor:
    """trl's tiled divergence: its forward KL at ``beta`` 0, its reverse KL at 1, a generalised JSD between them."""
    module = importlib.import_module("trl.kernels.chunked_divergence")
    divergence, _ = module.ChunkedDivergenceFunction.apply(
        problem.student, problem.student_weight, None, problem.teacher, problem.teacher_weight, None, beta
    )
    return divergence.mean()


def trl_gkd(problem: HiddenProblem, beta: float) -> Tensor:
    """The heads, then :func:`trl_gkd_of_logits`: what a trainer does whose models return logits."""
    student = problem.student @ problem.student_weight.t()
    return trl_gkd_of_logits(LogitsProblem(student, problem.teacher @ problem.teacher_weight.t()), beta)


def trl_gkd_of_logits(problem: LogitsProblem, beta: float) -> Tensor:
    """``F.kl_div`` of log-softmaxes. Two dimensions: of three its "batchmean" would divide by the first alone."""
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    return trainer.generalized_jsd_loss(problem.student, problem.teacher, beta=beta)


def liger_jsd(problem: HiddenProblem) -> Tensor:
    """liger-kernel's Triton kernel of the JSD, with its default: dW accumulated in the head's dtype."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_jsd")
    return module.LigerFusedLinearJSDFunction.apply(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, None, 0.5
    )


def liger_chunked_jsd(problem: HiddenProblem) -> Tensor:
    """liger-kernel's chunked loss in compiled PyTorch, at β = 1, which is KL(student‖teacher).

    The half of cross-entropy that its default mixes in is left out.
    """
    losses = importlib.import_module("liger_kernel.chunked_loss")
    loss = losses.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    sides = (problem.student, problem.student_weight, problem.teacher, problem.teacher_weight)
    return loss(*sides, no_labels(problem))


def orda(problem: HiddenProblem, divergence: str = "entropy_adaptive") -> Tensor:
    """orda-kernel: on a GPU its Triton kernels, elsewhere its torch path, which has all logits in memory.

    Its "entropy_adaptive" blends forward and reverse KL by a sigmoid of H_teacher / log V, not by a hard gate.
    """
    package = importlib.import_module("orda_kernel")
    output = package.distillation_loss(
        problem.student,
        problem.student_weight,
        no_labels(problem),
        package.SeparateTeacher(problem.teacher, problem.teacher_weight),
        student_ce_weight=0.0,
        kl_weight=1.0,
        kl_divergence=divergence,
        backend="triton" if problem.student.is_cuda else "torch",
    )
    return output.loss


def fla_fused_kl_div(problem: HiddenProblem) -> Tensor:
    """flash-linear-attention's forward KL: Triton only, logits in the inputs' dtype."""
    module = importlib.import_module("fla.modules.fused_kl_div")
    return module.fused_kl_div_loss(problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)


def torchtune_reverse_kl(problem: HiddenProblem) -> Tensor:
    return torchtune_chunked(problem, "ReverseKLWithChunkedOutputLoss")


def torchtune_forward_kl(problem: HiddenProblem) -> Tensor:
    """torchtune's forward KL without the teacher's entropy: −Σ q log p, whose gradients are the forward KL's."""
    return torchtune_chunked(problem, "ForwardKLWithChunkedOutputLoss")


def torchtune_chunked(problem: HiddenProblem, name: str) -> Tensor:
    """A loss of torchtune over lists of chunked logits. One chunk at a time is upcast, but all stay in memory."""
    loss = getattr(torchtune_losses(), name)()
    pieces = loss.num_output_chunks
    student = [x.unsqueeze(0) @ problem.student_weight.t() for x in problem.student.chunk(pieces)]
    teacher = [x.unsqueeze(0) @ problem.teacher_weight.t() for x in problem.teacher.chunk(pieces)]
    return loss(student, teacher, no_labels(problem).unsqueeze(0))


@cache
def torchtune_losses() -> ModuleType:
    """Loads the file of torchtune's losses by itself: the package cannot be imported beside a recent torchao."""
    path = importlib.metadata.distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear_cross_entropy(problem: HiddenProblem) -> Tensor:
    """torch's own chunked cross-entropy of hidden states, with labels that run through the vocabulary.

    It has one head and no teacher: the yardstick of what half of the work costs.
    """
    labels = torch.arange(len(problem.student), device=problem.student.device) % len(problem.student_weight)
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(problem.student, problem.student_weight, labels, options=options)
