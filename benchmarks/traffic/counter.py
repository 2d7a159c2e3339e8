"""Counts the bytes that Triton kernels and torch's operations move, and the flops of products.

Triton's interpreter hands every load and store of a kernel, whoever wrote it, to two functions of its builder with an
array of addresses and a mask. Lanes that the mask leaves out are not counted. Whether an address belongs to a block of
logits (or of their gradient) is known from the tensor whose memory it lies in (:func:`is_block`). A GPU's caches are
not imitated: these are the bytes that programs ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from eopd_kernels.testing.pretend import PRODUCTS

from ..problems import Shape

aten = torch.ops.aten
# Operands that lend only their form, or their memory; and results that nobody has written yet.
FORMS = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.new_zeros, aten.full_like}
OVERWRITTEN = {aten.copy_, aten.zero_, aten.fill_}
UNWRITTEN = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}


def is_block(tensor: Tensor, shape: Shape) -> bool:
    """Whether a tensor has V entries in one direction, and tokens and no hidden dimension in the other.

    D_s and D_t have to differ from each other and from the numbers of tokens.
    """
    if tensor.dim() != 2 or shape.vocab not in tensor.shape:
        return False
    other = tensor.shape[0] if tensor.shape[1] == shape.vocab else tensor.shape[1]
    return other not in (shape.student_dim, shape.teacher_dim)


@dataclass
class Traffic:
    """What was counted, in bytes and flops."""

    shape: Shape
    loads: dict[str, int] = field(default_factory=dict)  # of blocks, by kernel
    stores: dict[str, int] = field(default_factory=dict)
    rest: int = 0  # what kernels move besides blocks
    torch_bytes: int = 0  # blocks that torch's operations read and write, products aside
    product_bytes: int = 0  # blocks that products read and write
    student_flops: int = 0  # of products with D_s
    teacher_flops: int = 0  # of products with D_t
    logit_bytes: int = 0  # of one logit as kernels load it, at most

    def per_logit(self, count: int) -> float:
        """Divides a number of bytes by the tokens and the entries of the vocabulary."""
        return count / (self.shape.tokens * self.shape.vocab)

    @property
    def kernel_bytes(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def units(self) -> tuple[float, float]:
        """The flops of the products as (a, b) of F·(a·D_s + b·D_t), F = 2·N·V."""
        shape, unit = self.shape, 2 * self.shape.tokens * self.shape.vocab
        return self.student_flops / (unit * shape.student_dim), self.teacher_flops / (unit * shape.teacher_dim)


@contextmanager
def counting(shape: Shape) -> Iterator[Traffic]:
    """Counts what happens within the context. Triton must have been imported under TRITON_INTERPRET=1."""
    traffic = Traffic(shape)
    with kernels_counted(traffic), Operations(traffic):
        yield traffic


@contextmanager
def kernels_counted(traffic: Traffic) -> Iterator[None]:
    """Puts the counter between the interpreter and its builder's loads and stores."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    running: list[Launch] = []

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        running[-1].count(traffic, traffic.loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].count(traffic, traffic.stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
        running.append(Launch(self.fn.__name__, [memory_of(t) for t in tensors if is_block(t, traffic.shape)]))
        try:
            with _disable_current_modes():  # the interpreter copies its arguments
                return launch(self, *arguments, **options)
        finally:
            running.pop()

    with (
        mock.patch.multiple(builder, create_masked_load=counted_load, create_masked_store=counted_store),
        mock.patch.object(executor, "__call__", counted_launch),
    ):
        yield


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, and the (first, last) byte addresses of its blocks."""

    kernel: str
    blocks: list[tuple[int, int]]

    def count(self, traffic: Traffic, of_blocks: dict[str, int], ptrs: Any, mask: Any) -> None:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses, active = np.broadcast_arrays(ptrs.data, mask.data)
        addresses = addresses[active]
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, last in self.blocks:
            inside |= (addresses >= first) & (addresses <= last)
        blocks = int(inside.sum()) * size
        if blocks and of_blocks is traffic.loads:
            traffic.logit_bytes = max(traffic.logit_bytes, size)
        of_blocks[self.kernel] = of_blocks.get(self.kernel, 0) + blocks
        traffic.rest += addresses.size * size - blocks


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Returns the first and the last byte address of a tensor."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize - 1


class Operations(TorchDispatchMode):
    """Counts what torch's own operations do with blocks, and the flops of the products.

    Each operation counts as one kernel that reads its operands once and writes its results once.
    """

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.namespace != "aten":
            return result
        moved = self.block_bytes(func, args, kwargs, result)
        if func._overloadpacket in PRODUCTS:
            self.traffic.product_bytes += moved
            self.count_product(args, result)
        else:
            self.traffic.torch_bytes += moved
        return result

    def block_bytes(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Adds up the operands read and the results written. What is overwritten without looking is not read."""
        packet, arguments = func._overloadpacket, func._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        total = 0 if packet in UNWRITTEN else self.blocks(result)
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = written and (argument.is_out or packet in OVERWRITTEN)
            if not overwritten and packet not in FORMS:
                total += self.blocks(given.get(argument.name))
        return total

    def blocks(self, value: Any) -> int:
        """Adds up the bytes of the blocks in an argument or result."""
        tensors = value if isinstance(value, list | tuple) else [value]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor) and is_block(t, self.traffic.shape))

    def count_product(self, args: Any, result: Tensor) -> None:
        a, b = [x for x in args if isinstance(x, Tensor)][-2:]
        (m, k), n = a.shape[-2:], b.shape[-1]
        flops = 2 * m * k * n
        if self.traffic.shape.student_dim in (m, k, n):
            self.traffic.student_flops += flops
        else:
            assert self.traffic.shape.teacher_dim in (m, k, n), "a product that belongs to neither side"
            self.traffic.teacher_flops += flops
