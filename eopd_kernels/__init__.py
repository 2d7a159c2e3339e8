"""Entropy-aware on-policy distillation loss in fused, chunked passes: full logits never exist."""

from . import compiled as compiled  # its ops must be there when a graph from a cache calls them
from .distributed.num_items import global_num_items
from .function import EntropyAwareKL
from .heads.lm_head import LMHead
from .inputs.common_entries import common_entries
from .inputs.shifted import shifted
from .inputs.top_k_teacher import TopKTeacher
from .loss import EntropyAwareKLLoss, EntropyAwareKLOutput, entropy_aware_kl
from .objective.gates import EntropyGate, QuantileGate
from .objective.halves import Sampled, Skewed, TopK
from .objective.objective import Objective
from .row_math.statistics import RowStatistics

__version__ = "0.1.0"

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
    "common_entries",
    "entropy_aware_kl",
    "global_num_items",
    "shifted",
]
