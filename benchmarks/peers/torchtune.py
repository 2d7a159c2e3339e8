"""torchtune: losses over lists of chunked logits. A chunk is upcast at a time, but every chunk stays in memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..problems import HiddenProblem


def reverse_kl(problem: HiddenProblem) -> Tensor:
    return chunked(problem, "ReverseKLWithChunkedOutputLoss")


def forward_kl(problem: HiddenProblem) -> Tensor:
    """Without the teacher's entropy: −Σ q log p, whose gradients are the forward KL's."""
    return chunked(problem, "ForwardKLWithChunkedOutputLoss")


def chunked(problem: HiddenProblem, name: str) -> Tensor:
    loss = getattr(losses(), name)()
    pieces = loss.num_output_chunks
    student = [x.unsqueeze(0) @ problem.student_weight.t() for x in problem.student.chunk(pieces)]
    teacher = [x.unsqueeze(0) @ problem.teacher_weight.t() for x in problem.teacher.chunk(pieces)]
    return loss(student, teacher, torch.zeros(1, len(problem.student), dtype=torch.long, device=problem.student.device))


@cache
def losses() -> ModuleType:
    """The file of the losses by itself: the package cannot be imported beside a recent torchao."""
    path = importlib.metadata.distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
