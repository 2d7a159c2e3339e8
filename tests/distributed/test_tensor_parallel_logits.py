"""Logits that are DTensors are taken where they are sharded on the vocabulary, and whole vocabularies are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from eopd_kernels import LMHead, Objective, TopKTeacher, entropy_aware_kl
from tests.conftest import relative_error, upstream_for
from tests.distributed.processes import run_ranks
from tests.distributed.shards import solved
from tests.test_objectives import case_of


def dtensor_logits() -> tuple[float, float, list[str]]:
    """The errors of loss and gradient, and what is said of other placements."""
    mesh = init_device_mesh("cpu", (2,))
    case = case_of(Objective(), student="logits", teacher="logits")
    truth, (gradient,) = solved(case)

    def placed(tensor: Tensor, placement: Placement) -> Any:
        return distribute_tensor(tensor.detach(), mesh, [placement])

    student = placed(case.student, Shard(case.student.dim() - 1)).requires_grad_()
    teacher = placed(case.teacher, Shard(case.student.dim() - 1))
    out = entropy_aware_kl(student, teacher, tensor_parallel_group=mesh)
    (found,) = torch.autograd.grad(out.loss, student, upstream_for(out.loss))
    assert isinstance(found, DTensor) and found.placements == student.placements
    errors = relative_error(out.loss, truth.loss), relative_error(found.full_tensor(), gradient)
    says = []
    for other in (Replicate(), Shard(0)):
        for wrong in ((placed(case.student, other), teacher), (student, placed(case.teacher, other))):
            try:
                entropy_aware_kl(*wrong, tensor_parallel_group=mesh)
            except ValueError as error:
                says.append(str(error))
    return *errors, says


def whole_on_each_rank() -> dict[str, str]:
    """What is said of vocabularies that no one has cut."""
    logits, hidden, head = torch.randn(4, 12), torch.randn(4, 3), LMHead(torch.randn(12, 3))
    served = TopKTeacher(torch.zeros(4, 2).long(), torch.full((4, 2), -1.0))
    sides: dict[str, dict[str, Any]] = {
        "logits": {"student": logits, "teacher": logits},
        "heads": {"student": hidden, "student_head": head, "teacher": hidden, "teacher_head": head},
        "served": {"student": logits, "teacher": served, "objective": Objective(reverse="none", forward="top_k")},
        "teacher": {"student": logits[:, : (12, 0)[dist.get_rank()]], "teacher": logits},
    }
    found = {}
    for vocab_size in (12, 11):  # 11: with an entry of padding
        for name, given in sides.items():
            try:
                entropy_aware_kl(**given, vocab_size=vocab_size, tensor_parallel_group=dist.group.WORLD)
            except ValueError as error:
                found[f"{name}, {vocab_size}"] = str(error)
    return found


def both() -> tuple[Any, Any]:
    return dtensor_logits(), whole_on_each_rank()


def test_whole_vocabularies_are_refused_and_dtensors_are_taken_where_they_are_sharded() -> None:
    for (loss, gradient, says), whole in run_ranks(2, both, timeout=60.0):
        assert loss < 1e-6 and gradient < 5e-6
        assert len(says) == 4
        for i, message in enumerate(says):
            assert message.startswith(f"{('student', 'teacher')[i % 2]} must be sharded on its vocabulary, Shard("), (
                message
            )
        assert len(whole) == 8
        for name, message in whole.items():
            side = "teacher" if name.startswith("teacher") else "student"
            says_so = f"{side} must be a shard of the vocabulary on each rank of tensor_parallel_group, got all of "
            assert message.startswith(f"{says_so}vocab_size={name.split(', ')[1]} on every rank"), (name, message)
            assert "[12, 12] entries" in message
