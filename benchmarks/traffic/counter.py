"""Counts what a call moves: what Triton kernels load and store, what torch's operations read and write, and products.

Triton's interpreter hands every load and store of a kernel, whoever wrote it, to two functions of its builder with an
array of addresses and a mask. Lanes that the mask leaves out are not counted. An address belongs to a block of logits
(or of their gradient), or to something else, by the tensor whose memory it lies in (:meth:`Shape.is_block`). A GPU's
caches are not imitated: these are the bytes that programs ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
# Operands that lend only their form, or their memory; and results that nobody has written yet.
FORMS = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.new_zeros, aten.full_like}
OVERWRITTEN = {aten.copy_, aten.zero_, aten.fill_}
UNWRITTEN = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}


@dataclass(frozen=True)
class Shape:
    """The problem, by which blocks of logits are told from everything else: D_s and D_t differ from each other."""

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int

    def is_block(self, tensor: Tensor) -> bool:
        """Two-dimensional, V entries in one direction, tokens and no hidden dimension in the other."""
        if tensor.dim() != 2 or self.vocab not in tensor.shape:
            return False
        other = tensor.shape[0] if tensor.shape[1] == self.vocab else tensor.shape[1]
        return other not in (self.student_dim, self.teacher_dim)


@dataclass
class Traffic:
    """What was counted, in bytes; ``products``: flops of products with D_s, with D_t."""

    shape: Shape
    loads: dict[str, int] = field(default_factory=dict)  # of blocks, by kernel
    stores: dict[str, int] = field(default_factory=dict)
    rest: int = 0  # what kernels move besides blocks
    torch_bytes: int = 0  # blocks that torch's operations read and write, products aside
    product_bytes: int = 0  # blocks that products read and write
    student_flops: int = 0
    teacher_flops: int = 0
    logit_bytes: int = 0  # of one logit as kernels load it, at most

    def per_logit(self, count: int) -> float:
        """Bytes per token and entry of the vocabulary."""
        return count / (self.shape.tokens * self.shape.vocab)

    @property
    def kernel_bytes(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def units(self) -> tuple[float, float]:
        """(a, b) where the products are F·(a·D_s + b·D_t), F = 2·N·V."""
        unit = 2 * self.shape.tokens * self.shape.vocab
        return self.student_flops / (unit * self.shape.student_dim), self.teacher_flops / (
            unit * self.shape.teacher_dim
        )


@contextmanager
def counting(shape: Shape) -> Iterator[Traffic]:
    """Counts what happens within it. Triton must have been imported under TRITON_INTERPRET=1."""
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
        running.append(Launch(self.fn.__name__, [memory_of(t) for t in tensors if traffic.shape.is_block(t)]))
        try:
            with _disable_current_modes():  # the interpreter copies its arguments
                return launch(self, *arguments, **options)
        finally:
            running.pop()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    executor.__call__ = counted_launch
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = launch


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name and where its blocks lie, as (first, last) byte address."""

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
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize - 1


class Operations(TorchDispatchMode):
    """Counts what torch's own operations do with blocks, each as if it were one kernel that reads its operands once and
    writes its results once, and the flops of the products."""

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
        """Operands read plus results written. What an operation overwrites without looking is not read."""
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
        """The bytes of the blocks in an argument or result."""
        tensors = value if isinstance(value, list | tuple) else [value]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor) and self.traffic.shape.is_block(t))

    def count_product(self, args: Any, result: Tensor) -> None:
        a, b = [x for x in args if isinstance(x, Tensor)][-2:]
        (m, k), n = a.shape[-2:], b.shape[-1]
        flops = 2 * m * k * n
        if self.traffic.shape.student_dim in (m, k, n):
            self.traffic.student_flops += flops
        else:
            assert self.traffic.shape.teacher_dim in (m, k, n), "a product that belongs to neither side"
            self.traffic.teacher_flops += flops
