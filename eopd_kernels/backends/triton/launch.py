"""From tensors to launches: which kernel, cut how, with which arguments. Imported with the first call: so is Triton."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tensors import compute_dtype
from .alignment import ALIGNMENT, Variants
from .gradient_kernel import row_gradient_kernel
from .loss_and_gradient_kernel import row_loss_and_gradient_kernel
from .merge_kernel import merge_parts_kernel
from .mixture_gradient_kernel import row_mixture_gradient_kernel
from .mixture_kernel import row_mixture_kernel
from .statistics_kernel import row_statistics_kernel
from .table import (
    LANE_COLUMNS,
    MIXTURE_LANE_BYTES,
    MOST_PARTS,
    Processor,
    interpreted,
    parts_of_a_row,
    tiling,
    widest_vector,
)

# Triton's default until 3.9, and off after it. A multiply and an add in one halve the loops' arithmetic.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
NO_GATE = dict.fromkeys(("weights", "gate", "a", "b", "c"))
SPARE_COMBINE = dict.fromkeys(("gate_threshold", "r0", "r1", "f0", "f1"), 0.0)


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``."""
    plan = Plan.of(student, teacher, transforms, [])
    statistics = student.new_empty(plan.rows, 8, dtype=compute_dtype(student, teacher))
    with on(student.device):
        partial = partial_statistics(plan, None, statistics)
        if plan.parts > 1:
            merge(plan, partial, statistics, **NO_GATE, **SPARE_COMBINE)
    return statistics


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]."""
    plan = Plan.of(student, teacher, transforms, [out])
    with on(student.device):
        gradient(plan, statistics, a, b, c, out)


def row_loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    gate_threshold: float,
    combine: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics ``[n, 8]`` and gate ``[n]``, and the gradient into ``out``: one launch, or three for few rows."""
    plan = Plan.of(student, teacher, transforms, [out])
    statistics = student.new_empty(plan.rows, 8, dtype=weights.dtype)
    gate = torch.empty_like(weights)
    r0, r1, f0, f1 = combine
    gating = {
        "weights": weights,
        "gate": gate,
        "gate_threshold": gate_threshold,
        "r0": r0,
        "r1": r1,
        "f0": f0,
        "f1": f1,
    }
    with on(student.device):
        if plan.parts == 1:
            plan.launch(row_loss_and_gradient_kernel, statistics=statistics, **gating, **plan.matrix("out", out))
        else:
            partial = partial_statistics(plan, weights, statistics)
            a, b, c = weights.new_empty(3, plan.rows).unbind()
            merge(plan, partial, statistics, a=a, b=b, c=c, **gating)
            gradient(plan, statistics, a, b, c, out)
    return statistics, gate


def row_mixture(
    student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
) -> Tensor:
    """The four numbers of every row, ``[n, 4]``; those of a row's parts add up."""
    plan = Plan.of(student, teacher, transforms, [], MIXTURE_LANE_BYTES // statistics.element_size())
    mixture = statistics.new_empty(plan.rows * plan.parts, 4)
    with on(student.device):
        plan.launch(
            row_mixture_kernel, parts=plan.parts, statistics=statistics, **skew_arguments(skews), mixture=mixture
        )
    return mixture if plan.parts == 1 else mixture.view(plan.rows, plan.parts, 4).sum(1)


def row_mixture_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skews: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]."""
    plan = Plan.of(student, teacher, transforms, [out], MIXTURE_LANE_BYTES // statistics.element_size())
    with on(student.device):
        plan.launch(
            row_mixture_gradient_kernel,
            parts=plan.parts,
            statistics=statistics,
            a=a,
            b=b,
            c=c,
            **skew_arguments(skews),
            **plan.matrix("out", out),
        )


def skew_arguments(skews: Sequence[float]) -> dict[str, Any]:
    """Both halves' skews as a kernel takes them: without one it is a variant of its own."""
    forward, reverse = skews
    return {
        "forward_skew": forward,
        "reverse_skew": reverse,
        "FORWARD_PLAIN": forward == 0,
        "REVERSE_PLAIN": reverse == 0,
    }


def partial_statistics(plan: Plan, weights: Tensor | None, statistics: Tensor) -> Tensor:
    """Each part's numbers, ``[n · parts, 8]``: into ``statistics`` [n, 8] where a row is one part."""
    partial = statistics if plan.parts == 1 else statistics.new_empty(plan.rows * plan.parts, 8)
    plan.launch(row_statistics_kernel, parts=plan.parts, weights=weights, statistics=partial)
    return partial


def merge(plan: Plan, partial: Tensor, statistics: Tensor, **gating: Any) -> None:
    """The parts' numbers into ``statistics`` [n, 8]; with weights, the gate and the coefficients too."""
    merge_parts_kernel[(plan.rows,)](
        partial=partial,
        parts=plan.parts,
        statistics=statistics,
        **gating,
        MOST_PARTS=MOST_PARTS,
        num_warps=1,
        **FUSED_MULTIPLY_ADD,
    )


def gradient(plan: Plan, statistics: Tensor, a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> None:
    """The second visit."""
    plan.launch(row_gradient_kernel, parts=plan.parts, statistics=statistics, a=a, b=b, c=c, **plan.matrix("out", out))


@dataclass(frozen=True)
class Plan:
    """How a block of rows is launched: what all its kernels are given, and into how many parts a row is split."""

    arguments: dict[str, Any]
    vector: int
    rows: int
    parts: int

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Tensor,
        transforms: Sequence[float],
        outs: Sequence[Tensor],
        lane_columns: int = LANE_COLUMNS,
    ) -> Plan:
        matrices = [student, teacher, *outs]
        processor = processor_of(student.device)
        itemsize = max(m.element_size() for m in matrices)
        vector = widest_vector(itemsize, processor)
        aligned = all(m.data_ptr() % ALIGNMENT == 0 and m.stride(0) % vector == 0 for m in matrices)
        student_softcap, teacher_softcap = transforms[1] != 0, transforms[4] != 0
        demanding = student_softcap or teacher_softcap or itemsize == torch.float64.itemsize
        cut = tiling(vector if aligned else 1, demanding, lane_columns, processor)
        rows, vocab_size = student.shape
        student_inner, student_outer = folded(transforms[:3])
        teacher_inner, teacher_outer = folded(transforms[3:])
        plan = cls({}, cut.vector, rows, parts_of_a_row(rows, vocab_size, cut, processor))
        plan.arguments.update(
            plan.matrix("student", student),
            **plan.matrix("teacher", teacher),
            vocab_size=vocab_size,
            student_inner=student_inner,
            student_outer=student_outer,
            teacher_inner=teacher_inner,
            teacher_outer=teacher_outer,
            STUDENT_SOFTCAP=student_softcap,
            TEACHER_SOFTCAP=teacher_softcap,
            STEPS=cut.steps,
            LANES=cut.lanes,
            VECTOR=cut.vector,
            num_warps=cut.num_warps,
            **cut.options,
            **FUSED_MULTIPLY_ADD,
        )
        return plan

    def matrix(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """A block ``[n, V]`` as a kernel takes it, its row stride in vectors."""
        return {name: tensor, f"{name}_stride": tensor.stride(0) // self.vector}

    def launch(self, kernel: Variants, **arguments: Any) -> None:
        """A program per row, or per part of a row where the kernel takes parts."""
        variant = kernel.any_rows if self.vector == 1 else kernel.aligned
        variant[(self.rows * arguments.get("parts", 1),)](**self.arguments, **arguments)


def folded(transform: Sequence[float]) -> tuple[float, float]:
    """Inner and outer factor: z = outer·tanh(inner·x) with a softcap, z = inner·x without."""
    scale, softcap, temperature = transform
    if softcap == 0:
        return scale / temperature, 1.0
    return scale / softcap, softcap / temperature


@functools.cache
def processor_of(device: torch.device) -> Processor:
    """What the table wants to know of a device."""
    if interpreted():
        return Processor(multiprocessors=8, warp_size=1, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.multi_processor_count, properties.warp_size, amd=torch.version.hip is not None)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, so it has to be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
