"""Matrix products whose result is never rounded to 16 bits, whatever the operands are.

A GPU multiplies 16-bit operands exactly and sums the products in fp32; ``out_dtype=`` hands that sum out as it is. A
CPU has no such product: there the operands are brought to the result's precision first, the head a panel at a time
(:class:`eopd_kernels.LMHead`). Both functions write into ``out`` and allocate nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import devices

LOW_PRECISION = (torch.bfloat16, torch.float16)
# mm(out_dtype=) is there since torch 2.8, but addmm takes an fp32 accumulator since 2.10 only (pytorch #167931).
OLDEST_WIDENING_TORCH = "2.10"


def widening(device: torch.device) -> bool:
    """Whether products of 16-bit operands with an fp32 result exist on this device."""
    return devices.kind(device) == "cuda" and torch.__version__ >= OLDEST_WIDENING_TORCH


def operand_dtype(
    hidden: Tensor, weight: Tensor, logits: torch.dtype, autocast: torch.dtype | None = None
) -> torch.dtype:
    """The dtype in which hidden states, head and the gradient of the logits enter the products.

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


def add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out`` += ``a`` · ``b``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
