"""Problems cut along their vocabulary: a rank's share of the logits, or of both heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eopd_kernels import LMHead, TopKTeacher, entropy_aware_kl
from tests.conftest import Case, upstream_for

SMALL = {"workspace_bytes": 1}  # chunks of 32 tokens


def part_of(case: Case, sizes: list[int]) -> tuple[Case, slice]:
    """This rank's share of a problem, as new leaves."""
    rank = dist.get_rank()
    here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def leaf(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def side(tensor: Any, head: LMHead | None) -> tuple[Any, LMHead | None]:
        if isinstance(tensor, TopKTeacher):
            return tensor, None
        if head is None:
            return leaf(tensor[..., here]), None
        bias = None if head.bias is None else head.bias[here]
        return leaf(tensor), LMHead(leaf(head.weight[here]), leaf(bias), scale=head.scale, softcap=head.softcap)

    student, student_head = side(case.student, case.student_head)
    teacher, teacher_head = side(case.teacher, case.teacher_head)
    part = replace(case, student=student, student_head=student_head, teacher=teacher, teacher_head=teacher_head)
    return part, here


def solved(case: Case, **options: Any) -> tuple[Any, list[Tensor]]:
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, **options)
    return out, list(torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss)))


def halves_of(case: Case, sizes: list[int] | None = None) -> Case:
    """On two ranks, of 611 entries."""
    return part_of(case, [305, 306] if sizes is None else sizes)[0]
