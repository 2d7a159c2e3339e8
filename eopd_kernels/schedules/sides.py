"""One side of the comparison, logits or hidden states with a head, as rows from which blocks of logits are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import products
from ..heads.lm_head import LMHead
from ..tensors import compute_dtype, uniform_rows

# A chunk of tokens: consecutive ones, or an index of those that count.
Rows = slice | Tensor


class LogitsSide:
    """A side that arrives as logits ``[..., V]``, of any strides; blocks are views of it wherever that is possible.

    ``dtype`` is that of its blocks, ``gradient_dtype`` that of their gradient, as the student. Rows between two
    multiples of ``run`` can be taken as one block.
    """

    head = None

    def __init__(self, logits: Tensor, local_vocab_size: int) -> None:
        whole = local_vocab_size == logits.shape[-1]
        self.tensor = logits if whole else logits[..., :local_vocab_size]  # [..., V]
        self.local_vocab_size = local_vocab_size
        self.dtype = self.gradient_dtype = logits.dtype
        self.leading = logits.shape[:-1]
        self.depth, self.run = uniform_rows(logits)

    def block_bytes(self, gathered: bool) -> int:
        """Returns the bytes of workspace per logit of a block; 0 where blocks are views."""
        copied = gathered or (self.tensor.stride(-1) != 1 and self.local_vocab_size > 1)
        return self.tensor.itemsize if copied else 0

    def gradient_bytes(self) -> int:
        """Returns the bytes of workspace per logit for the student's gradient; 0 where it goes elsewhere."""
        return 0

    def take(self, rows: Rows) -> Tensor:
        """Returns the rows of a chunk of tokens, once for all its blocks."""
        if isinstance(rows, Tensor):
            places: list[Tensor] = []
            for size in reversed(self.leading):  # not torch.unravel_index, which waits for a GPU
                places.insert(0, rows % size)
                rows = rows // size
            return self.tensor[tuple(places)]
        block = self.view(rows)
        return block if block.stride(1) == 1 else block.contiguous()

    def view(self, rows: slice) -> Tensor:
        """Returns consecutive rows of one run as a view ``[n, V]``."""
        place, first = divmod(rows.start, max(self.run, 1))
        outer: list[int] = []
        for size in reversed(self.leading[: self.depth]):
            place, i = divmod(place, size)
            outer.insert(0, i)
        run = self.tensor[tuple(outer)] if outer else self.tensor
        return run.view(-1, self.local_vocab_size)[first : first + length(rows)]

    def logits(self, taken: Tensor, columns: slice, buffer: Tensor | None) -> Tensor:
        """Returns the block of logits ``[n, k]`` of the rows taken, in ``buffer`` if it has to be computed."""
        return taken[:, columns]


class HiddenSide:
    """A side that arrives as hidden states ``[..., D]`` with a head; its logits have the compute dtype.

    ``valid`` ``[N]`` marks the tokens that count where masked ones ride along: their hidden states are read as 0, so
    that a NaN among them cannot reach the weight's gradient. ``autocast`` is the dtype of torch.autocast, or None. A
    head that has another dtype is copied once, as torch.autocast does it; what autocast decided when the loss was
    called still holds in backward.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: LMHead,
        local_vocab_size: int,
        valid: Tensor | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])  # [N, D]
        self.local_vocab_size = local_vocab_size
        self.run = len(self.hidden)
        self.dtype = compute_dtype(hidden, head.weight, head.bias)
        self.gradient_dtype = products.operand_dtype(hidden, head.weight, self.dtype, autocast)
        low_precision = self.gradient_dtype in products.LOW_PRECISION
        self.head = head.cast(self.gradient_dtype) if low_precision else head
        self.valid = valid

    def block_bytes(self, gathered: bool) -> int:
        return self.dtype.itemsize

    def gradient_bytes(self) -> int:
        return 0 if self.gradient_dtype == self.dtype else self.gradient_dtype.itemsize

    def take(self, rows: Rows) -> Tensor:
        taken = self.hidden[rows].to(self.gradient_dtype)
        return taken if self.valid is None else torch.where(self.valid[rows].unsqueeze(1), taken, 0.0)

    def logits(self, taken: Tensor, columns: slice, buffer: Tensor | None) -> Tensor:
        assert buffer is not None
        return self.head.logits(taken, columns, out=buffer)


Side = LogitsSide | HiddenSide


def nothing_held(tensor: Tensor, head: LMHead | None, valid: Tensor | None, autocast: torch.dtype | None) -> Side:
    """Returns a side for a rank that holds no entry that is compared: one entry whose logit is −inf.

    It adds nothing to any row and cannot be among its likeliest.
    """
    if head is None:
        side = LogitsSide(tensor.new_full((), -torch.inf).expand(*tensor.shape[:-1], 1), 1)
        side.run = uniform_rows(tensor)[1]  # chunks end where they do on the other ranks
        return side
    weight = head.weight.new_zeros(1, head.weight.shape[1])
    bias = (head.weight if head.bias is None else head.bias).new_full((1,), -torch.inf)
    return HiddenSide(tensor, LMHead(weight, bias), 1, valid, autocast)


def length(rows: Rows) -> int:
    """Returns the number of tokens in a chunk."""
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
