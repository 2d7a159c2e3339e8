"""From tensors to launches: which kernel, cut how, with which arguments. Imported with the first call: so is Triton."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...head import compute_dtype
from .merge_parts import merge_parts_kernel
from .row_gradient import row_gradient_kernel
from .row_loss_and_gradient import row_loss_and_gradient_kernel
from .row_statistics import row_statistics_kernel
from .table import MOST_PARTS, Processor, Tiling, interpreted, parts_of_a_row, tiling

NO_GATE = dict.fromkeys(("weights", "gate", "a", "b", "c"))
SPARE_COMBINE = dict.fromkeys(("gate_threshold", "r0", "r1", "f0", "f1"), 0.0)


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``."""
    shared, cut, parts = prepared(student, teacher, transforms, [])
    statistics = student.new_empty(len(student), 8, dtype=compute_dtype(student, teacher))
    with on(student.device):
        partial = partial_statistics(shared, cut, parts, None, statistics)
        if parts > 1:
            merge(partial, parts, statistics, **NO_GATE, **SPARE_COMBINE)
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
    shared, cut, parts = prepared(student, teacher, transforms, [out])
    with on(student.device):
        gradient(shared, cut, parts, statistics, (a, b, c), out)


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
    shared, cut, parts = prepared(student, teacher, transforms, [out])
    n = len(student)
    statistics = student.new_empty(n, 8, dtype=weights.dtype)
    gate = torch.empty_like(weights)
    gating = {"gate_threshold": gate_threshold, **dict(zip(("r0", "r1", "f0", "f1"), combine, strict=True))}
    with on(student.device):
        if parts == 1:
            row_loss_and_gradient_kernel[(n,)](
                **shared,
                **gating,
                weights=weights,
                statistics=statistics,
                gate=gate,
                out=out,
                out_stride=out.stride(0),
                **cut.arguments,
            )
        else:
            coefficients = weights.new_empty(3, n).unbind()
            partial = partial_statistics(shared, cut, parts, weights, statistics)
            a, b, c = coefficients
            merge(partial, parts, statistics, weights=weights, gate=gate, a=a, b=b, c=c, **gating)
            gradient(shared, cut, parts, statistics, coefficients, out)
    return statistics, gate


def partial_statistics(
    shared: dict[str, Any], cut: Tiling, parts: int, weights: Tensor | None, statistics: Tensor
) -> Tensor:
    """Each part's numbers, ``[n · parts, 8]``: into ``statistics`` [n, 8] where a row is one part."""
    n = len(statistics)
    partial = statistics if parts == 1 else statistics.new_empty(n * parts, 8)
    row_statistics_kernel[(n * parts,)](**shared, weights=weights, parts=parts, statistics=partial, **cut.arguments)
    return partial


def merge(partial: Tensor, parts: int, statistics: Tensor, **gating: Any) -> None:
    """The parts' numbers into ``statistics`` [n, 8]; with weights, the gate and the coefficients too."""
    merge_parts_kernel[(len(statistics),)](
        partial=partial, parts=parts, statistics=statistics, **gating, MOST_PARTS=MOST_PARTS, num_warps=1
    )


def gradient(
    shared: dict[str, Any],
    cut: Tiling,
    parts: int,
    statistics: Tensor,
    coefficients: Sequence[Tensor],
    out: Tensor,
) -> None:
    """The second visit."""
    a, b, c = coefficients
    row_gradient_kernel[(len(statistics) * parts,)](
        **shared,
        statistics=statistics,
        a=a,
        b=b,
        c=c,
        parts=parts,
        out=out,
        out_stride=out.stride(0),
        **cut.arguments,
    )


def prepared(
    student: Tensor, teacher: Tensor, transforms: Sequence[float], outs: Sequence[Tensor]
) -> tuple[dict[str, Any], Tiling, int]:
    """What all kernels are given, how they cut a row into tiles, and into how many parts it is split."""
    matrices = [student, teacher, *outs]
    processor = processor_of(student.device)
    cut = tiling(max(m.element_size() for m in matrices), processor)
    n, vocab_size = student.shape
    student_inner, student_outer = folded(transforms[:3])
    teacher_inner, teacher_outer = folded(transforms[3:])
    shared = {
        "student": student,
        "teacher": teacher,
        "student_stride": student.stride(0),
        "teacher_stride": teacher.stride(0),
        "vocab_size": vocab_size,
        "student_inner": student_inner,
        "student_outer": student_outer,
        "teacher_inner": teacher_inner,
        "teacher_outer": teacher_outer,
        "STUDENT_SOFTCAP": transforms[1] != 0,
        "TEACHER_SOFTCAP": transforms[4] != 0,
        "ALIGNED": all(m.data_ptr() % 16 == 0 and m.stride(0) % cut.vector == 0 for m in matrices),
    }
    return shared, cut, parts_of_a_row(n, vocab_size, cut, processor)


def folded(transform: Sequence[float]) -> tuple[float, float]:
    """Inner and outer factor: z = outer·tanh(inner·x) with a softcap, z = inner·x without (``row_math.transformed``)."""
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
    return Processor(properties.multi_processor_count, properties.warp_size)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, so it has to be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
