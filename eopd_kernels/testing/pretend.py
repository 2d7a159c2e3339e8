"""Makes CPU tensors take the branches of a GPU, and watches what would wait for the GPU and how much memory is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .. import tensors

aten = torch.ops.aten
# Operations that wait for the device, or copy from the host's pageable memory, which waits too.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.nonzero_static,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten.lift_fresh,
    aten.repeat_interleave,
    aten._unique2,
}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}


@contextmanager
def gpu() -> Iterator[None]:
    """Makes every tensor count as one on a GPU, and gives CPU tensors the products with an fp32 result."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        check_widening(a, b, out_dtype, out)
        return out.copy_(exact(a, b, out_dtype))

    def addmm(base: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        check_widening(a, b, out_dtype, out)
        assert base.dtype == out_dtype
        return out.copy_(base + exact(a, b, out_dtype))

    kind = tensors.kind
    tensors.kind = lambda device: "cuda"
    try:
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        # Before torch 2.12 that of meta tensors takes the dtype for beta.
        library.impl("addmm.dtype_out", addmm, "Meta", allow_override=True)
        yield
    finally:
        tensors.kind = kind
        library._destroy()


def exact(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies in ``dtype``."""
    with torch.autocast("cpu", enabled=False):
        return a.to(dtype) @ b.to(dtype)


def check_widening(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
    """Asserts what CUDA's implementation requires."""
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    assert out_dtype == out.dtype == torch.float32


class Product(NamedTuple):
    """One matrix product: the shapes (m, k, n), the operands' dtype and the result's, and how rows are aligned.

    Args:
        alignment: the most bytes, up to 16, of which every row of operands and result begins at a multiple, counted
            from where their memory begins.
    """

    shape: tuple[int, int, int]
    operands: torch.dtype
    result: torch.dtype
    alignment: int


def alignment(matrix: Tensor) -> int:
    """Returns the most bytes, up to 16, of which every row (every column, if transposed) begins at a multiple."""
    pitches = sorted(stride for stride, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1)
    pitches = pitches[1:] if pitches[:1] == [1] else pitches
    return math.gcd(16, matrix.storage_offset() * matrix.itemsize, *(pitch * matrix.itemsize for pitch in pitches))


class Watch(TorchDispatchMode):
    """Fails on operations that would wait for a GPU, and records products and copies from 16 bits to fp32.

    Indexing with a mask is such a wait. Copies between devices cannot be seen, because all tensors are on one.

    Args:
        waits: how many are let through.
    """

    def __init__(self, waits: int = 0) -> None:
        super().__init__()
        self.waits = waits
        self.products: list[Product] = []
        self.upcast: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in WAITING:
            assert self.waits > 0, f"{func} waits for the device"
            self.waits -= 1
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), f"{func} with a mask waits"
        result = func(*args, **(kwargs or {}))
        if packet in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            aligned = min(map(alignment, (a, b, result)))
            self.products.append(Product((*a.shape, b.shape[1]), a.dtype, result.dtype, aligned))
        if packet in (aten._to_copy, aten.copy_) and result.dim() == 2 and result.dtype == torch.float32:
            source = args[0] if packet is aten._to_copy else args[1]
            if source.dtype in (torch.bfloat16, torch.float16):
                self.upcast.append(result.shape)
        return result


class PeakMemory(TorchDispatchMode):
    """Measures the most bytes alive at one time among the tensors made within it, meta tensors included."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


class WithoutFp64(TorchDispatchMode):
    """Makes CPU tensors those of a device that has no fp64 and no products of 16 bits that give fp32, as Apple's MPS.

    Fails on every operation that returns fp64.
    """

    def __enter__(self) -> Any:
        self.kind, tensors.kind = tensors.kind, lambda device: "mps"
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        tensors.kind = self.kind
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result
