"""What the extensions of csrc/ have in common: how they are handed a tensor, and why one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

# As csrc/problem.h numbers them.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# What setup.py has built and, where it has not, why. Not resolved: in the Hub's cache every file is a link elsewhere.
RECORD = Path(__file__).parents[1] / "_build.json"

at = Tensor.data_ptr


def matrix(tensor: Tensor) -> tuple[int, int, int]:
    """Address, dtype code and row stride of a block ``[n, V]``."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0)


def why_not_built(part: str, name: str, error: ImportError) -> str:
    """Why importing ``part`` gave ``error``, in a sentence of which ``name`` is the subject.

    Whether a part is there, only its import tells: the record is of the last build, and where a package is built in
    place, by several Pythons, of that one's.
    """
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if part not in record:
        where = f"in {RECORD.parent}, where Python found the package"
        return f"{name} were never built {where} (pip install . or python setup.py build_ext --inplace builds them)"
    if record[part]["built"]:
        return f"{name} were built but cannot be loaded: {error}"
    return f"{name} were not built: {record[part]['reason']}"
