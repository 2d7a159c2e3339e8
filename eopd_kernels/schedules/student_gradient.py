"""The gradient of the student and its head: summed up over the blocks of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kept_memory, tensors
from ..distributed.vocabulary import Shard, Travelling
from ..heads.lm_head import grad_weight
from .blocks import block_in
from .sides import HiddenSide, LogitsSide, Rows


class LogitsGradient:
    """The gradient of a student that arrived as logits: written by the kernel where it belongs, in their dtype.

    ``inplace`` puts it into the logits' own memory, a row at a time, once the row has been read.
    """

    def __init__(self, logits: Tensor, side: LogitsSide, inplace: bool) -> None:
        if inplace:
            self.gradient = logits.detach()
            torch.autograd.graph.increment_version(logits)  # whoever saved them for backward is told
        else:
            self.gradient = kept_memory.empty(logits.shape, logits.dtype, logits.device)
        if side.local_vocab_size < logits.shape[-1]:
            self.gradient[..., side.local_vocab_size :].zero_()
        self.rows = LogitsSide(self.gradient, side.local_vocab_size)

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        """Returns where the kernel is to write the gradient of a block of the student's logits [n, k]."""
        assert isinstance(rows, slice)
        return self.rows.view(rows)[:, columns]

    def begin(self, rows: Rows, taken: Tensor) -> None:
        """Begins a chunk of tokens."""

    def add(self, columns: slice, gradient: Tensor) -> None:
        """Takes up the gradient [n, k] of one block of the chunk."""

    def end(self) -> None:
        """Completes the chunk."""

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of student, weight and bias, None where not asked for."""
        return self.gradient, None, None


class HiddenGradient:
    """The gradients of hidden states, weight and bias from the blocks' gradients.

    A block's gradient overwrites the block where it has its dtype. In 16 bits, as a GPU's products want it, it has
    memory of its own: the kernel's programs write a row while they still read it. The accumulators have the compute
    dtype whatever the inputs have: chunks of tokens split the sum behind the weight's gradient, slices of the
    vocabulary the one behind the hidden states'.

    The weight's gradient has no memory before the first block is added, when other blocks may have been given back.
    ``rounded``, it is written once, in bf16, and never exists in the compute dtype.

    With a ``shard`` the hidden states' gradient is the sum of those that every rank has from its entries: each chunk's
    travels while the next is computed.
    """

    def __init__(
        self,
        side: HiddenSide,
        needs: tuple[bool, bool, bool],
        block: int,
        shard: Shard | None = None,
        rounded: bool = False,
    ) -> None:
        def new(shape: torch.Size, needed: bool) -> Tensor | None:
            return tensors.zeros(shape, side.dtype, side.hidden.device) if needed else None

        self.side, self.head, self.needs_weight, self.rounded = side, side.head, needs[1], rounded
        # The first chunk writes the weight's gradient, and the others add to it. Not on a CPU, where its fresh pages
        # would fault within the product. That took 1.00, 1.03 and 1.18 times as long for 128 tokens of V = 49,152,
        # 151,936 and 262,144.
        self.unwritten = rounded or not tensors.on_host(side.hidden.device)
        self.hidden = new(side.hidden.shape, needs[0])  # [N, D]
        self.weight: Tensor | None = None  # [V, D]
        self.bias = new(self.head.weight.shape[:1], needs[2])  # [V]
        self.shard = shard if shard is not None and shard.sums_hidden_gradient else None
        self.travelling: tuple[Rows, Tensor, Travelling] | None = None
        self.block: Tensor | None = None
        if side.gradient_bytes():
            self.block = kept_memory.empty((block,), side.gradient_dtype, side.hidden.device, kept_memory.BLOCKS)

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        return student if self.block is None else block_in(self.block, *student.shape)

    def begin(self, rows: Rows, taken: Tensor) -> None:
        self.rows, self.taken = rows, taken
        if self.needs_weight and self.weight is None:
            self.weight = self.new_weight(kept_memory.empty if self.unwritten else kept_memory.zeros)
            if self.unwritten:
                self.weight[self.side.local_vocab_size :].zero_()
        if self.hidden is not None:
            self.chunk = self.hidden[rows]  # a view for a slice, a copy (of zeros) for an index

    def new_weight(self, make: Callable[..., Tensor]) -> Tensor:
        dtype = torch.bfloat16 if self.rounded else self.side.dtype
        return make(self.head.weight.shape, dtype, self.side.hidden.device)

    def add(self, columns: slice, gradient: Tensor) -> None:
        if self.hidden is not None:
            self.head.grad_hidden(gradient, columns, out=self.chunk)
        if self.weight is not None:
            grad_weight(gradient, self.taken, out=self.weight[columns], add=not self.unwritten)
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=self.bias.dtype)

    def end(self) -> None:
        self.unwritten = False
        if self.hidden is None:
            return
        if self.shard is None:
            self.put(self.rows, self.chunk)
        else:
            self.arrive()
            self.travelling = self.rows, self.chunk, self.shard.sum(self.chunk)

    def arrive(self) -> None:
        """Waits for the chunk that travels."""
        if self.travelling is not None:
            rows, chunk, travelling = self.travelling
            travelling.wait()
            self.put(rows, chunk)
            self.travelling = None

    def put(self, rows: Rows, chunk: Tensor) -> None:
        """Puts a chunk's gradient where it belongs, unless it is a view and there already."""
        if self.hidden is not None and isinstance(rows, Tensor):
            self.hidden[rows] = chunk

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self.arrive()
        if self.needs_weight and self.weight is None:  # there was no chunk
            self.weight = self.new_weight(tensors.zeros)
        return self.hidden, self.weight, self.bias


class NothingHeld:
    """The gradients of a rank none of whose entries is compared: zeros; it takes part in the sum of the hidden states'.

    Its sides are those of :func:`nothing_held`, one entry of no mass, and so is what ``of_entry`` collects.
    """

    def __init__(
        self, tensors: Sequence[Tensor | None], needs: tuple[bool, bool, bool], of_entry: HiddenGradient | None
    ) -> None:
        self.given, self.needs, self.of_entry = tensors, needs, of_entry

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        return torch.empty_like(student) if self.of_entry is None else self.of_entry.target(rows, columns, student)

    def begin(self, rows: Rows, taken: Tensor) -> None:
        if self.of_entry is not None:
            self.of_entry.begin(rows, taken)

    def add(self, columns: slice, gradient: Tensor) -> None: ...

    def end(self) -> None:
        if self.of_entry is not None:
            self.of_entry.end()

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        student, weight, bias = (
            torch.zeros_like(t) if t is not None and n else None for t, n in zip(self.given, self.needs, strict=True)
        )
        return student if self.of_entry is None else self.of_entry.tensors()[0], weight, bias


StudentGradient = LogitsGradient | HiddenGradient | NothingHeld  # where a schedule leaves the blocks' gradients
