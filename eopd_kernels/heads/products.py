"""Matrix products whose result is never rounded to 16 bits, whatever the operands are.

A GPU multiplies 16-bit operands exactly and sums the products in fp32; ``out_dtype=`` hands that sum out as it is. A
CPU has no such product: there the operands are brought to the result's precision first, the head a panel at a time
(:class:`eopd_kernels.LMHead`). All functions write into ``out`` and allocate nothing.

Products of fp32 operands follow torch's switch on a GPU (``torch.set_float32_matmul_precision``,
``torch.backends.cuda.matmul``), as the model's own head does: whoever allows TF32 has logits of 10 bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import tensors

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Columns of the logits that a CPU's product makes at a time. MKL brings the head into its own order first, for few
# tokens a good part of the work, and is quicker at it where the piece stays in the cache: times of all columns at once
# over those of 512, 1,024, 2,048 and 4,096 (two cores, AVX2, fp32, medians of 9 rounds) were 1.49, 1.53, 1.44 and 1.14
# for 128 tokens of V = 49,152, D = 576; 1.23, 1.23, 1.17, 1.09 for 336 and 1.11, 1.10, 1.09, 0.99 for 1,024 of them;
# 1.55, 1.54, 1.44, 1.35 for 128 of V = 151,936, D = 1,024. The products behind the gradients gain nothing.
HOST_COLUMNS = 1024


def widening(device: torch.device) -> bool:
    """Returns whether products of 16-bit operands with an fp32 result exist on this device.

    CUDA has them since torch 2.10 (pytorch #167931). Other devices, ROCm's among them, are asked once.
    """
    kind = tensors.kind(device)
    if kind == "cuda" and torch.version.hip is None:
        return True
    return kind not in ("cpu", "meta") and found_widening(device.type)


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
    else the dtype of the ``logits``. As everywhere in torch, autocast leaves fp64 alone.
    """
    agreed = weight.dtype if hidden.dtype == weight.dtype else logits
    wanted = agreed if autocast is None or logits == torch.float64 else autocast
    return wanted if wanted in LOW_PRECISION and widening(hidden.device) else logits


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` = ``a`` · ``b``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` [n, k] = ``hidden`` [n, D] · ``weight`` [k, D]ᵀ."""
    columns = HOST_COLUMNS if tensors.on_host(hidden.device) else max(1, len(weight))
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        mm(hidden, weight[part].t(), out=out[:, part])


def add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` += ``a`` · ``b``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
