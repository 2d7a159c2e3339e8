"""Matrix products whose result is never rounded to 16 bits, whatever the operands are.

A GPU multiplies 16-bit operands exactly and sums the products in fp32; ``out_dtype=`` hands that sum out as it is. On a
CPU torch has no such product. Where the processor multiplies bf16 (AVX512_BF16), csrc/cpu/products.cpp does the same;
on others, and for fp16, the operands are brought to the result's precision first, the head a panel at a time
(:class:`eopd_kernels.LMHead`). All functions write into ``out``.

Products of fp32 operands follow torch's switch on a GPU (``torch.set_float32_matmul_precision``,
``torch.backends.cuda.matmul``), as the model's own head does: whoever allows TF32 has logits of 10 bits.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .. import tensors

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Columns of the logits that a CPU's product makes at a time. MKL brings the head into its own order first, for few
# tokens a good part of the work, and is quicker at it where the piece stays in the cache: times of all columns at once
# over those of 512, 1,024, 2,048 and 4,096 (two cores, AVX2, fp32, medians of 9 rounds) were 1.49, 1.53, 1.44 and 1.14
# for 128 tokens of V = 49,152, D = 576; 1.23, 1.23, 1.17, 1.09 for 336 and 1.11, 1.10, 1.09, 0.99 for 1,024 of them;
# 1.55, 1.54, 1.44, 1.35 for 128 of V = 151,936, D = 1,024. With AVX-512 (Zen 4, one core) over those of 1,024: 1.14,
# 1.09, 1.09 and 0.93 for 128, 256, 341 and 1,024 tokens, 1.22 for 128 of V = 151,936. The products behind the gradients
# gain nothing.
HOST_COLUMNS = 1024


def widening(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether products of operands of this 16-bit ``dtype`` with an fp32 result exist on this device.

    CUDA has them since torch 2.10 (pytorch #167931). Other devices, ROCm's among them, are asked once.
    """
    kind = tensors.kind(device)
    if kind == "cuda" and torch.version.hip is None:
        return True
    if kind == "cpu":
        extension = native()
        return dtype == torch.bfloat16 and extension is not None and extension.multiplies_bfloat16()
    return kind != "meta" and found_widening(device.type)


@functools.cache
def native() -> ModuleType | None:
    """Returns the native kernels, or None where they were not built."""
    try:
        from .. import _native
    except ImportError:
        return None
    return _native


@functools.cache
def found_widening(kind: str) -> bool:
    """Tries both products on a device of this kind."""
    with torch.utils._python_dispatch._disable_current_modes():
        a = torch.ones(16, 16, dtype=torch.bfloat16, device=kind)
        out = torch.ones(16, 16, dtype=torch.float32, device=kind)
        try:
            mm(a, a, out)
            add_mm(a, a, out)
        except (RuntimeError, NotImplementedError):
            return False
    return True


def operand_dtype(
    hidden: Tensor, weight: Tensor, logits: torch.dtype, autocast: torch.dtype | None = None
) -> torch.dtype:
    """Returns the dtype in which hidden states, head and the gradient of the logits enter the products.

    16 bits where hidden states and head agree on 16 bits, or autocast asks for them, and the device has the products;
    else the dtype of the ``logits``. As everywhere in torch, autocast leaves fp64 alone. On a CPU it changes nothing:
    not all of them multiply bf16, and a loss should not depend on which one it is.
    """
    agreed = weight.dtype if hidden.dtype == weight.dtype else logits
    wanted = agreed if autocast is None or tensors.on_host(hidden.device) else autocast
    low = wanted in LOW_PRECISION and logits == torch.float32
    return wanted if low and widening(hidden.device, wanted) else logits


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = ``a`` · ``b``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif tensors.on_host(out.device):
        native_mm(a, b, out, add=False)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` += ``a`` · ``b``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif tensors.on_host(out.device):
        native_mm(a, b, out, add=True)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


def native_mm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """The same by the native kernels, bf16 to fp32; ``out`` [n, k] has contiguous rows.

    Tensors without numbers, which have no memory either, are left alone.
    """
    if not tensors.has_numbers(out):
        return
    a, b = (matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in (a, b))
    extension = native()
    assert extension is not None and a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert out.stride(1) == 1 or out.shape[1] <= 1, "out has no contiguous rows"
    extension.multiply_bfloat16(
        (a.data_ptr(), *a.stride()),
        (b.data_ptr(), *b.stride()),
        (out.data_ptr(), out.stride(0)),
        (*out.shape, a.shape[1]),
        add,
        torch.get_num_threads(),
    )


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` [n, k] = ``hidden`` [n, D] · ``weight`` [k, D]ᵀ."""
    in_pieces = tensors.on_host(hidden.device) and hidden.dtype == out.dtype
    columns = HOST_COLUMNS if in_pieces else max(1, len(weight))
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        mm(hidden, weight[part].t(), out=out[:, part])
