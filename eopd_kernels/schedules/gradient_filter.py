"""gradient_filter=: the products behind the gradients for the columns that have a gradient worth the name only.

Most entries of a vocabulary have next to no probability on either side, and so next to no gradient. The products with
those columns are most of the backward's work and little of its result. docs/math.md, "The gradient filter", has the
definition and what is lost on real hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tensors
from ..distributed.vocabulary import Shard
from ..heads import products
from .blocks import block_in, pitch
from .sides import HiddenSide
from .student_gradient import HiddenGradient

# Columns that are gathered at a time: panels of the gradient, of the head and of dW, 12 MiB in all at 342 tokens and
# D = 576. 3, 10, 30 and 50 % of 49,152 columns there, one thread, both products: 18, 57, 150 and 249 ms in panels of
# 2,048; 18, 64, 160 and 252 ms in panels of 8,192; all columns without gathering 463 ms.
PANEL_COLUMNS = 2048
# Above this share the columns are not gathered: from the figures above that costs as much as it saves.
DENSE_ABOVE = 0.8


class FilteredGradient(HiddenGradient):
    """A :class:`HiddenGradient` whose products leave out columns that stay below ``threshold`` in a whole block.

    What they would have added to the hidden states' gradient is not dropped but estimated: each row's sum over the
    columns left out, times the mean of the head's rows there. The rows of a head have much in common, so that this is
    most of it. The bias's gradient is exact.
    """

    def __init__(
        self,
        side: HiddenSide,
        needs: tuple[bool, bool, bool],
        block: int,
        threshold: Tensor,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(side, needs, block, shard)
        self.threshold = threshold
        self.unwritten = False  # only some of dW's rows will be written
        self.weight_sums: dict[int, Tensor] = {}  # of the head's rows of a slice of the vocabulary, by its start

    def add(self, columns: slice, gradient: Tensor) -> None:
        if len(gradient) == 0:
            return
        if not tensors.has_numbers(gradient):  # all columns then: the most that it may take
            super().add(columns, gradient)
            return
        kept = significant_columns(gradient, self.threshold)
        if len(kept) > DENSE_ABOVE * gradient.shape[1]:
            super().add(columns, gradient)
            return
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=self.bias.dtype)
        left_out_weight = None if self.hidden is None else self._weight_sum(columns)
        for part in kept.split(PANEL_COLUMNS):
            ids, panel = columns.start + part, columns_of(gradient, part)  # [k], [n, k]
            if left_out_weight is not None:
                weight = self.head.weight.index_select(0, ids).to(panel.dtype)
                products.add_mm(panel, weight, out=self.chunk)
                left_out_weight = left_out_weight - weight.sum(0, dtype=left_out_weight.dtype)
            if self.weight is not None:
                of_panel = self.weight.new_empty(len(ids), self.weight.shape[1])
                products.mm(panel.t(), self.taken, out=of_panel)
                self.weight.index_add_(0, ids, of_panel)
        if left_out_weight is not None:
            left_out = gradient.new_ones(gradient.shape[1], 1).index_fill_(0, kept, 0.0)
            row_sums = self.chunk.new_empty(len(gradient), 1)
            products.mm(gradient, left_out, out=row_sums)
            self.chunk.addr_(row_sums.squeeze(1), left_out_weight / (gradient.shape[1] - len(kept)))

    def _weight_sum(self, columns: slice) -> Tensor:
        """The sum of the head's rows ``columns``, ``[D]``, taken once."""
        if columns.start not in self.weight_sums:
            self.weight_sums[columns.start] = self.head.weight[columns].sum(0, dtype=self.chunk.dtype)
        return self.weight_sums[columns.start]


def columns_of(gradient: Tensor, places: Tensor) -> Tensor:
    """Copies the columns of ``gradient`` [n, V] at ``places`` [k] into a block [n, k]."""
    n, k = len(gradient), len(places)
    panel = block_in(gradient.new_empty(n * pitch(k, gradient.device)), n, k)
    return torch.index_select(gradient, 1, places, out=panel)


def significant_columns(gradient: Tensor, threshold: Tensor) -> Tensor:
    """The columns of ``gradient`` [n, k] with an entry whose size is ``threshold`` or more, or that holds a NaN.

    On a GPU their number has to travel to the host.
    """
    # Largest and smallest by themselves: abs() would need another block, and aminmax takes seven times as long.
    below = (gradient.amax(0) < threshold) & (gradient.amin(0) > -threshold)
    return (~below).nonzero().squeeze(1)
