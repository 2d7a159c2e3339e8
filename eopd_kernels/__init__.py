"""Entropy-aware on-policy distillation loss in fused, chunked passes: full logits never exist."""

from importlib.metadata import version

from .function import EntropyAwareKL
from .head import LMHead
from .loss import EntropyAwareKLLoss, EntropyAwareKLOutput, entropy_aware_kl
from .objective import EntropyGate, Objective

__version__ = version("eopd-kernels")

__all__ = [
    "EntropyAwareKL",
    "EntropyAwareKLLoss",
    "EntropyAwareKLOutput",
    "EntropyGate",
    "LMHead",
    "Objective",
    "entropy_aware_kl",
]
