"""From tensors to launches: which kernel, cut how, with which arguments. Imported with the first call: so is Triton."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import Block
from .alignment import ALIGNMENT, Variants
from .gradient_kernel import row_gradient_kernel
from .loss_and_gradient_kernel import row_loss_and_gradient_kernel
from .merge_kernel import merge_parts_kernel
from .mixture_gradient_kernel import row_mixture_gradient_kernel
from .mixture_kernel import row_mixture_kernel
from .row_math import Combine
from .statistics_kernel import row_statistics_kernel
from .table import (
    FUSED_MULTIPLY_ADD,
    LANE_COLUMNS,
    MIXTURE_LANE_BYTES,
    MOST_PARTS,
    Processor,
    compiler_options,
    interpreted,
    options_of,
    parts_of_a_row,
    widest_vector,
)

NO_GATE = dict.fromkeys(("weights", "gate", "loss", "a", "b", "c")) | dict.fromkeys(
    ("gate_threshold", *Combine._fields), 0.0
)


def row_statistics(block: Block, statistics: Tensor) -> None:
    """The eight numbers of every row into ``statistics`` [n, 8]."""
    launch = Launch.of(block)
    partial = launch.partial(statistics)
    with on(block.student.device):
        launch.of_parts(row_statistics_kernel)(weights=None, statistics=partial, **launch.sides)
        if launch.parts > 1:
            launch.merging(partial=partial, statistics=statistics, **NO_GATE)


def row_gradient(block: Block, statistics: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; ``statistics`` [n, 8], the coefficients [n]."""
    launch = Launch.of(block)
    with on(block.student.device):
        launch.of_parts(row_gradient_kernel)(statistics=statistics, a=a, b=b, c=c, **launch.sides, **launch.out)


def row_loss_and_gradient(
    block: Block,
    weights: Tensor,  # [n]
    gate_threshold: float,
    combine: Sequence[float],
    statistics: Tensor,  # [n, 8], written
    gate: Tensor,  # [n], written
    loss: Tensor,  # [n], written
) -> None:
    """Statistics, gate, loss and gradient of the rows whose weight is not 0: one launch, or three for few rows."""
    launch = Launch.of(block)
    gating: dict[str, Any] = {"weights": weights, "gate": gate, "loss": loss, "gate_threshold": gate_threshold}
    gating |= zip(Combine._fields, combine, strict=True)
    with on(block.student.device):
        if launch.parts == 1:
            launch.of_rows(row_loss_and_gradient_kernel)(statistics=statistics, **gating, **launch.sides, **launch.out)
            return
        partial = launch.partial(statistics)
        a, b, c = weights.new_empty(3, launch.rows).unbind()
        launch.of_parts(row_statistics_kernel)(weights=weights, statistics=partial, **launch.sides)
        launch.merging(partial=partial, statistics=statistics, a=a, b=b, c=c, **gating)
        launch.of_parts(row_gradient_kernel)(statistics=statistics, a=a, b=b, c=c, **launch.sides, **launch.out)


def row_mixture(block: Block, statistics: Tensor, skews: Sequence[float], mixture: Tensor) -> None:
    """The four numbers of every row into ``mixture`` [n, 4]; ``statistics`` [n, 8], of whole rows."""
    launch = Launch.of(block, skews)
    partial = launch.partial(mixture)
    with on(block.student.device):
        launch.of_parts(row_mixture_kernel)(statistics=statistics, mixture=partial, **launch.sides)
    if launch.parts > 1:  # those of a row's parts add up
        torch.sum(partial.view(launch.rows, launch.parts, 4), 1, out=mixture)


def row_mixture_gradient(
    block: Block,
    statistics: Tensor,  # [n, 8], of whole rows
    a: Tensor,  # [n]
    b: Tensor,  # [n]
    c: Tensor,  # [n]
    skews: Sequence[float],
) -> None:
    """∂/∂x_s of Σ rows' skewed divergences into ``out`` [n, V]."""
    launch = Launch.of(block, skews)
    with on(block.student.device):
        launch.of_parts(row_mixture_gradient_kernel)(statistics=statistics, a=a, b=b, c=c, **launch.sides, **launch.out)


@dataclass(frozen=True)
class Launch:
    """How a block is launched.

    Args:
        sides: what every kernel is given: both sides, their transforms, the tile, the compiler's options.
        out: what a kernel is given that writes a gradient.
        rows: n.
        parts: how many programs share a row.
        aligned: whether all rows begin at multiples of 16 bytes.
    """

    sides: dict[str, Any]
    out: dict[str, Any]
    rows: int
    parts: int
    aligned: bool

    @classmethod
    def of(cls, block: Block, skews: Sequence[float] | None = None) -> Launch:
        """The launch of a block, cut as the table says; ``skews``: for its skewed divergences, of both halves."""
        student, teacher, transforms, out, _ = block
        matrices = (student, teacher, out)
        processor = processor_of(student.device)
        itemsize = max(m.element_size() for m in matrices)
        vector = widest_vector(itemsize, processor)
        aligned = all(m.data_ptr() % ALIGNMENT == 0 and m.stride(0) % vector == 0 for m in matrices)
        lane_columns = LANE_COLUMNS if skews is None else MIXTURE_LANE_BYTES // max(itemsize, 4)
        softcaps = (transforms[1] != 0, transforms[4] != 0)
        options = options_of(vector if aligned else 1, softcaps, lane_columns, processor)
        sides: dict[str, Any] = compiler_options(options, itemsize == 8, lane_columns, processor)
        if skews is not None:
            sides["forward_skew"], sides["reverse_skew"] = skews
            options = options._replace(forward_plain=skews[0] == 0, reverse_plain=skews[1] == 0)
        for side, logits, transform in (("student", student, transforms[:3]), ("teacher", teacher, transforms[3:])):
            sides |= {side: logits, f"{side}_stride": logits.stride(0) // options.vector}
            sides[f"{side}_inner"], sides[f"{side}_outer"] = folded(transform)
        rows, vocab_size = student.shape
        sides |= {"vocab_size": vocab_size, "OPTIONS": options}
        writes = {"out": out, "out_stride": out.stride(0) // options.vector}
        parts = parts_of_a_row(rows, vocab_size, options.columns, processor)
        return cls(sides, writes, rows, parts, options.vector > 1)

    def of_rows(self, kernel: Variants) -> Callable[..., Any]:
        """Launches the kernel with a program per row."""
        return cast("Callable[..., Any]", (kernel.aligned if self.aligned else kernel.any_rows)[(self.rows,)])

    def of_parts(self, kernel: Variants) -> Callable[..., Any]:
        """Launches the kernel with a program per part of a row."""
        variant = kernel.aligned if self.aligned else kernel.any_rows
        return functools.partial(variant[(self.rows * self.parts,)], parts=self.parts)

    @property
    def merging(self) -> Callable[..., Any]:
        """Launches the merge of each row's parts."""
        launch = merge_parts_kernel[(self.rows,)]
        return functools.partial(launch, parts=self.parts, MOST_PARTS=MOST_PARTS, num_warps=1, **FUSED_MULTIPLY_ADD)

    def partial(self, numbers: Tensor) -> Tensor:
        """Memory for the numbers of each part: those of the rows, ``numbers`` [n, k], where a row is one part."""
        return numbers if self.parts == 1 else numbers.new_empty(self.rows * self.parts, numbers.shape[1])


def folded(transform: Sequence[float]) -> tuple[float, float]:
    """The inner and the outer factor of a transform: z = outer·tanh(inner·x) with a softcap, z = inner·x without."""
    scale, softcap, temperature = transform
    if softcap == 0:
        return scale / temperature, 1.0
    return scale / softcap, softcap / temperature


@functools.cache
def processor_of(device: torch.device) -> Processor:
    """The device, as far as the table wants to know it."""
    if interpreted():
        return Processor(multiprocessors=8, warp_size=1, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.multi_processor_count, properties.warp_size, amd=torch.version.hip is not None)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
