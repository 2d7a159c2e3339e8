"""Seen: what a forward pass leaves of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_math.statistics import RowStatistics
from .loss_terms import Terms
from .problem import Problem
from .sides import Rows


@dataclass(frozen=True, eq=False)
class Seen:
    """What a forward pass leaves of all N tokens; 0 (statistics: empty) for those that were not visited.

    Args:
        packed: ``[N, 8]`` the statistics.
        gate: ``[N]`` how far it is open.
        reverse, forward: ``[N]`` the halves, 0 where they have no weight.
        loss: ``[N]`` c_r·R + c_f·F.
    """

    packed: Tensor
    gate: Tensor
    reverse: Tensor
    forward: Tensor
    loss: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Seen:
        weights = problem.weights
        packed = RowStatistics.empty(len(weights), weights.dtype, weights.device).packed
        return cls(packed, *(torch.zeros_like(weights) for _ in range(4)))

    def put(self, rows: Rows, packed: Tensor, gate: Tensor, terms: Terms | None) -> None:
        """Notes what was seen of one chunk; without terms, its halves are not known yet."""
        self.packed[rows], self.gate[rows] = packed, gate
        if terms is not None:
            self.reverse[rows], self.forward[rows], self.loss[rows] = terms.reverse, terms.forward, terms.loss
