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
# Above this share of the two products columns are not gathered: from the figures above that costs as much as it saves.
DENSE_ABOVE = 0.8
# Of the threshold: what a column needs for the hidden states' gradient, which loses three times as much as the weight's
# where both leave out the same. With a quarter they lose the same: docs/math.md has the errors and what it costs.
HIDDEN_THRESHOLD = 0.25


class FilteredGradient(HiddenGradient):
    """A :class:`HiddenGradient` whose products leave out columns that stay below ``threshold`` in a whole block.

    The hidden states' gradient leaves out those that stay below a quarter of it. What they would have added is not
    dropped but estimated: each row's sum over them, times the mean of the head's rows between the two thresholds. The
    rows of a head have much in common, and neighbours in size more, so that this is most of it. The bias's gradient is
    exact.
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

    def add(self, columns: slice, gradient: Tensor) -> None:
        if len(gradient) == 0:
            return
        if not tensors.has_numbers(gradient):  # all columns then: the most that it may take
            super().add(columns, gradient)
            return
        of_both, of_hidden = significant_columns(gradient, self.threshold)
        if len(of_both) + len(of_hidden) / 2 > DENSE_ABOVE * gradient.shape[1]:
            super().add(columns, gradient)
            return
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=self.bias.dtype)
        for part in of_both.split(PANEL_COLUMNS):
            ids, panel = columns.start + part, columns_of(gradient, part)  # [k], [n, k]
            if self.hidden is not None:
                self._add_to_hidden(panel, ids)
            if self.weight is not None:
                of_panel = self.weight.new_empty(len(ids), self.weight.shape[1])
                products.mm(panel.t(), self.taken, out=of_panel)
                self.weight.index_add_(0, ids, of_panel)
        if self.hidden is None or len(of_hidden) == 0:
            return
        mean = self.chunk.new_zeros(self.chunk.shape[1])  # [D]
        for part in of_hidden.split(PANEL_COLUMNS):
            weight = self._add_to_hidden(columns_of(gradient, part), columns.start + part)
            mean += weight.sum(0, dtype=mean.dtype) / len(of_hidden)
        left_out = gradient.new_ones(gradient.shape[1], 1)
        left_out.index_fill_(0, torch.cat([of_both, of_hidden]), 0.0)
        row_sums = self.chunk.new_empty(len(gradient), 1)
        products.mm(gradient, left_out, out=row_sums)
        self.chunk.addr_(row_sums.squeeze(1), mean)

    def _add_to_hidden(self, panel: Tensor, ids: Tensor) -> Tensor:
        """Adds the product of a panel [n, k] with the head's rows ``ids`` [k]; returns these."""
        weight = self.head.weight.index_select(0, ids).to(panel.dtype)
        products.add_mm(panel, weight, out=self.chunk)
        return weight


def columns_of(gradient: Tensor, places: Tensor) -> Tensor:
    """Copies the columns of ``gradient`` [n, V] at ``places`` [k] into a block [n, k]."""
    n, k = len(gradient), len(places)
    panel = block_in(gradient.new_empty(n * pitch(k, gradient.device)), n, k)
    return torch.index_select(gradient, 1, places, out=panel)


def significant_columns(gradient: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of ``gradient`` [n, k] for both products, and those for the hidden states' alone.

    Of the first an entry has the size of ``threshold`` or more, or is a NaN; of the others one has a quarter of it or
    more. On a GPU their numbers have to travel to the host.
    """
    # Largest and smallest by themselves: abs() would need another block, and aminmax takes seven times as long.
    size = torch.maximum(gradient.amax(0), -gradient.amin(0))
    below, far_below = size < threshold, size < HIDDEN_THRESHOLD * threshold
    return (~below).nonzero().squeeze(1), (below & ~far_below).nonzero().squeeze(1)
