"""Entropy-aware on-policy distillation loss in fused, chunked passes: full logits never exist."""

from importlib.metadata import version

from . import compiled as compiled  # its ops must be there when a graph from a cache calls them
from .denominators import global_num_items
from .function import EntropyAwareKL
from .gates import EntropyGate, QuantileGate
from .halves import Sampled, Skewed, TopK
from .head import LMHead
from .loss import EntropyAwareKLLoss, EntropyAwareKLOutput, entropy_aware_kl
from .objective import Objective
from .sparse_teacher import TopKTeacher
from .statistics import RowStatistics

__version__ = version("eopd-kernels")

__all__ = [
    "EntropyAwareKL",
    "EntropyAwareKLLoss",
    "EntropyAwareKLOutput",
    "EntropyGate",
    "LMHead",
    "Objective",
    "QuantileGate",
    "RowStatistics",
    "Sampled",
    "Skewed",
    "TopK",
    "TopKTeacher",
    "entropy_aware_kl",
    "global_num_items",
]
