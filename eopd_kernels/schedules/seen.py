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
        token_log_probs: ``[N, 2]`` log p(y) and log q(y) of the sampled tokens, or None where there are none.
    """

    packed: Tensor
    gate: Tensor
    reverse: Tensor
    forward: Tensor
    loss: Tensor
    token_log_probs: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that there are, in the order of the fields."""
        tensors = (self.packed, self.gate, self.reverse, self.forward, self.loss)
        return tensors if self.token_log_probs is None else (*tensors, self.token_log_probs)

    @classmethod
    def empty(cls, problem: Problem) -> Seen:
        weights = problem.weights
        packed = RowStatistics.empty(len(weights), weights.dtype, weights.device).packed
        token = None if problem.tokens.token_ids is None else weights.new_zeros(len(weights), 2)
        gate, reverse, forward, loss = (torch.zeros_like(weights) for _ in range(4))
        return cls(packed, gate, reverse, forward, loss, token)

    def put(self, rows: Rows, statistics: RowStatistics, gate: Tensor, terms: Terms | None) -> None:
        """Notes what was seen of one chunk; without terms, its halves are not known yet."""
        self.packed[rows], self.gate[rows] = statistics.packed, gate
        if self.token_log_probs is not None and statistics.token_log_probs is not None:
            self.token_log_probs[rows] = statistics.token_log_probs
        if terms is not None:
            self.reverse[rows], self.forward[rows], self.loss[rows] = terms.reverse, terms.forward, terms.loss
