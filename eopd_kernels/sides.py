"""A side of the comparison, logits or hidden states with a head, seen as rows from which blocks of logits are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import memory, products
from .head import LMHead, compute_dtype, grad_weight
from .parallel import Shard, Travelling

# A chunk of tokens: consecutive ones, or an index of those that count.
Rows = slice | Tensor


class Side(Protocol):
    """What a schedule needs of the student or the teacher."""

    vocab_size: int
    transform: tuple[float, float]  # scale and softcap, 0 for no softcap
    dtype: torch.dtype  # of its blocks of logits
    gradient_dtype: torch.dtype  # of the gradient of its logits, as the student
    run: int  # rows between two multiples of `run` can be taken as one block

    def block_bytes(self, gathered: bool) -> int:
        """Workspace per logit of a block; 0 where blocks are views."""

    def gradient_bytes(self) -> int:
        """Workspace per logit for the gradient of a block, as the student; 0 where it goes elsewhere."""

    def take(self, rows: Rows) -> Tensor:
        """The rows of a chunk of tokens, once for all its blocks."""

    def logits(self, taken: Tensor, columns: slice, buffer: Tensor | None) -> Tensor:
        """The block of logits [n, k] of the rows taken, in ``buffer`` if it has to be computed."""


class LogitsSide:
    """A side that arrives as logits ``[..., V]``, of any strides; blocks are views of it wherever that is possible."""

    transform = (1.0, 0.0)

    def __init__(self, logits: Tensor, vocab_size: int) -> None:
        self.tensor = logits[..., :vocab_size]  # [..., V]
        self.vocab_size = vocab_size
        self.dtype = self.gradient_dtype = logits.dtype
        self.leading = logits.shape[:-1]
        self.depth, self.run = uniform_rows(logits)

    def block_bytes(self, gathered: bool) -> int:
        copied = gathered or (self.tensor.stride(-1) != 1 and self.vocab_size > 1)
        return self.tensor.itemsize if copied else 0

    def gradient_bytes(self) -> int:
        return 0

    def take(self, rows: Rows) -> Tensor:
        if isinstance(rows, Tensor):
            return self.tensor[torch.unravel_index(rows, self.leading)]
        block = self.view(rows)
        return block if block.stride(1) == 1 else block.contiguous()

    def view(self, rows: slice) -> Tensor:
        """Consecutive rows of one run, as a view ``[n, V]``."""
        run = max(self.run, 1)
        outer = tuple(int(i) for i in unravel(rows.start // run, self.leading[: self.depth]))
        return self.tensor[outer].view(-1, self.vocab_size)[rows.start % run : rows.start % run + length(rows)]

    def logits(self, taken: Tensor, columns: slice, buffer: Tensor | None) -> Tensor:
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
        vocab_size: int,
        valid: Tensor | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])  # [N, D]
        self.vocab_size = vocab_size
        self.transform = (head.scale, head.softcap or 0.0)
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


class StudentGradient(Protocol):
    """Where a schedule leaves the gradient of the student's blocks."""

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        """Where the kernel writes the gradient of a block of the student's logits [n, k]."""

    def begin(self, rows: Rows, taken: Tensor) -> None:
        """A chunk of tokens begins."""

    def add(self, columns: slice, gradient: Tensor) -> None:
        """Takes up the gradient [n, k] of one block of the chunk."""

    def end(self) -> None:
        """The chunk is complete."""

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of student, weight and bias, None where not asked for."""


class LogitsGradient:
    """The gradient of a student that arrived as logits: written by the kernel where it belongs, in their dtype.

    ``inplace`` puts it into the logits' own memory, a row at a time, once the row has been read.
    """

    def __init__(self, logits: Tensor, side: LogitsSide, inplace: bool) -> None:
        if inplace:
            self.gradient = logits.detach()
            torch.autograd.graph.increment_version(logits)  # whoever saved them for backward is told
        else:
            self.gradient = memory.empty(logits.shape, logits.dtype, logits.device)
        if side.vocab_size < logits.shape[-1]:
            self.gradient[..., side.vocab_size :].zero_()
        self.rows = LogitsSide(self.gradient, side.vocab_size)

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        assert isinstance(rows, slice)
        return self.rows.view(rows)[:, columns]

    def begin(self, rows: Rows, taken: Tensor) -> None: ...

    def add(self, columns: slice, gradient: Tensor) -> None: ...

    def end(self) -> None: ...

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.gradient, None, None


class HiddenGradient:
    """The gradients of hidden states, weight and bias from the blocks' gradients.

    A block's gradient overwrites the block where it has its dtype. In 16 bits, as a GPU's products want it, it has
    memory of its own: the kernel's programs write a row while they still read it. The accumulators have the compute
    dtype whatever the inputs have: chunks of tokens split the sum behind the weight's gradient, slices of the
    vocabulary the one behind the hidden states'.

    With a ``shard`` the hidden states' gradient is the sum of those that every rank has from its entries: each chunk's
    travels while the next is computed.
    """

    def __init__(
        self, side: HiddenSide, needs: tuple[bool, bool, bool], block: int, shard: Shard | None = None
    ) -> None:
        def zeros(shape: torch.Size, needed: bool) -> Tensor | None:
            return memory.zeros(shape, side.dtype, side.hidden.device) if needed else None

        # Zeroed although the first chunk could write the weight's gradient: then its fresh pages fault within the
        # product. That took 1.00, 1.03 and 1.18 times as long for 128 tokens of V = 49,152, 151,936 and 262,144.
        self.head = side.head
        self.hidden = zeros(side.hidden.shape, needs[0])  # [N, D]
        self.weight = zeros(side.head.weight.shape, needs[1])  # [V, D]
        self.bias = zeros(side.head.weight.shape[:1], needs[2])  # [V]
        self.shard = shard if shard is not None and shard.sums_hidden_gradient else None
        self.travelling: tuple[Rows, Tensor, Travelling] | None = None
        self.block: Tensor | None = None
        if side.gradient_bytes():
            self.block = memory.empty((block,), side.gradient_dtype, side.hidden.device)

    def target(self, rows: Rows, columns: slice, student: Tensor) -> Tensor:
        return student if self.block is None else self.block[: student.numel()].view_as(student)

    def begin(self, rows: Rows, taken: Tensor) -> None:
        self.rows, self.taken = rows, taken
        if self.hidden is not None:
            self.chunk = self.hidden[rows]  # a view for a slice, a copy (of zeros) for an index

    def add(self, columns: slice, gradient: Tensor) -> None:
        if self.hidden is not None:
            self.head.grad_hidden(gradient, columns, out=self.chunk)
        if self.weight is not None:
            grad_weight(gradient, self.taken, out=self.weight[columns])
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=self.bias.dtype)

    def end(self) -> None:
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
        return self.hidden, self.weight, self.bias


class NothingHeld:
    """The gradients of a rank none of whose entries is compared: 0. Of its hidden states it takes part in the sum.

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


def nothing_held(
    tensor: Tensor, head: LMHead | None, valid: Tensor | None, autocast: torch.dtype | None
) -> LogitsSide | HiddenSide:
    """A side of which a rank holds no entry that is compared: one entry whose logit is −inf, which adds nothing to any
    row and cannot be among its likeliest."""
    if head is None:
        side = LogitsSide(tensor.new_full((), -torch.inf).expand(*tensor.shape[:-1], 1), 1)
        side.run = uniform_rows(tensor)[1]  # chunks end where they do on the other ranks
        return side
    weight = head.weight.new_zeros(1, head.weight.shape[1])
    bias = (head.weight if head.bias is None else head.bias).new_full((1,), -torch.inf)
    return HiddenSide(tensor, LMHead(weight, bias), 1, valid, autocast)


def uniform_rows(tensor: Tensor) -> tuple[int, int]:
    """How many leading dimensions must be indexed away before the rest is rows of one stride, and how many rows that
    leaves: (0, N) for a contiguous tensor, (1, T−1) for ``logits[:, :-1]``."""
    rows, row_stride, depth = 1, 0, tensor.dim() - 1
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size != 1:  # the stride of a dimension of one element means nothing
            if rows > 1 and stride != rows * row_stride:
                break
            row_stride = stride if rows == 1 else row_stride
            rows *= size
        depth -= 1
    return depth, rows


def unravel(index: int, shape: torch.Size) -> Iterator[int]:
    """The position in ``shape`` of the flat ``index``."""
    for size in reversed_products(shape):
        yield index // size
        index %= size


def reversed_products(shape: torch.Size) -> list[int]:
    """The row-major strides of ``shape``."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def length(rows: Rows) -> int:
    """The number of tokens in a chunk."""
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
