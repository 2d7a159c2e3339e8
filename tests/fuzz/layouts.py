"""How the numbers of a tensor lie in memory: permuted, sliced, stepped, expanded, with strides that mean nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*SIGNED, torch.uint8)


@dataclass(frozen=True)
class Layout:
    """A view of given shape of a block of memory.

    Args:
        name: for people.
        shape: of the view.
        content: the same with 1 where the view is expanded.
        memory: the shape of the block.
        select: from the block to a view of the shape ``content``, without overlap.
    """

    name: str
    shape: tuple[int, ...]
    content: tuple[int, ...]
    memory: tuple[int, ...]
    select: Callable[[Tensor], Tensor]

    def view(self, block: Tensor) -> Tensor:
        """The view of a block of memory; differentiable."""
        return self.select(block).expand(self.shape)

    def block(self, values: Tensor) -> Tensor:
        """A block of memory that holds ``values`` (of the shape ``content``), and around them what must not be read."""
        canary = torch.nan if values.is_floating_point() else 1 if values.dtype == torch.bool else 101
        block = torch.full(self.memory, canary, dtype=values.dtype)
        self.select(block).copy_(values)
        return block

    def adjoint(self, gradient: Tensor) -> Tensor:
        """What a gradient of the view is for the block of memory: 0 outside of it, summed where it is expanded."""
        block = torch.zeros(self.memory, dtype=gradient.dtype, requires_grad=True)
        return torch.autograd.grad(self.view(block), block, gradient)[0]


def layout(choose: random.Random, shape: Sequence[int], *, dense_rows: bool = False, keep_last: bool = False) -> Layout:
    """Any layout of a tensor of this shape.

    Args:
        dense_rows: the last dimension is contiguous and nothing is expanded, as ``inplace=True`` asks.
        keep_last: the last dimension is not expanded.
    """
    shape = tuple(shape)
    content = list(shape)
    names: list[str] = []
    if not dense_rows and choose.random() < 0.25:
        free = range(len(shape) - (1 if keep_last else 0))
        for axis in free:
            if choose.random() < 0.6:
                content[axis] = min(1, shape[axis])
        names += ["expanded"] if tuple(content) != shape else []
    order = list(range(len(shape)))
    if choose.random() < 0.35:
        head = order[:-1] if dense_rows else order
        choose.shuffle(head)
        order = head + order[len(head) :]
        names += ["permuted"] if order != sorted(order) else []
    steps, befores, afters = ([1] * len(shape), [0] * len(shape), [0] * len(shape))
    if choose.random() < 0.35:
        for axis in range(len(shape)):
            last = axis == len(shape) - 1
            steps[axis] = 1 if dense_rows and last else choose.choice((1, 1, 2, 3))
            befores[axis], afters[axis] = choose.choice((0, 0, 1, 2)), choose.choice((0, 0, 1, 5))
        names.append("sliced")
    extents = [b + n * s + a for b, n, s, a in zip(befores, content, steps, afters, strict=True)]
    ends = [b + n * s for b, n, s in zip(befores, content, steps, strict=True)]
    slices = tuple(slice(b, e, s) for b, e, s in zip(befores, ends, steps, strict=True))
    inverse = [order.index(axis) for axis in range(len(shape))]
    odd = {axis: choose.choice((0, 1, 3, 1000)) for axis in range(len(shape)) if content[axis] == 1}
    if dense_rows:
        odd.pop(len(shape) - 1, None)
    if choose.random() < 0.3 and odd:
        names.append("strides of size 1")
    else:
        odd = {}

    def select(block: Tensor) -> Tensor:
        view = block.permute(tuple(inverse))[slices]
        if not odd or view.numel() == 0:
            return view
        strides = [odd.get(axis, stride) for axis, stride in enumerate(view.stride())]
        return view.as_strided(view.shape, strides)

    memory = tuple(extents[axis] for axis in order)
    return Layout(" ".join(names) or "contiguous", shape, tuple(content), memory, select)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One tensor argument: a block of memory and the view of it that is passed."""

    memory: Tensor
    layout: Layout

    @classmethod
    def of(cls, layout: Layout, values: Tensor) -> Drawn:
        """With these values, of the layout's shape; of an expanded dimension the first are taken."""
        for axis, (n, whole) in enumerate(zip(layout.content, layout.shape, strict=True)):
            if n != whole:
                values = values.narrow(axis, 0, n)
        return cls(layout.block(values), layout)

    @property
    def tensor(self) -> Tensor:
        return self.layout.view(self.memory)

    def __str__(self) -> str:
        dtype = str(self.memory.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.layout.shape)} {self.layout.name} strides {self.tensor.stride()}"
