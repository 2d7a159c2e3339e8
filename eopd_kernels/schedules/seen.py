"""Seen: what a forward pass leaves of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_math.statistics import RowStatistics
from .loss_terms import Terms
from .problem import Problem
from .sides import Rows


@dataclass(eq=False)
class Seen:
    """What a forward pass leaves of all N tokens; 0 (statistics: empty) for those that were not visited.

    Args:
        packed: ``[N, 8]`` the statistics.
        gate: ``[N]`` how far it is open.
        reverse, forward: ``[N]`` the halves, 0 where they have no weight.
        loss: ``[N]`` c_r·R + c_f·F + λ·C.
        token_log_probs: ``[N, 2]`` log p(y) and log q(y) of the sampled tokens, or None where there are none.
    """

    packed: Tensor
    gate: Tensor
    reverse: Tensor
    forward: Tensor
    loss: Tensor
    token_log_probs: Tensor | None = None

    @property
    def teacher_entropy(self) -> Tensor:
        """``[N]`` H_t."""
        return RowStatistics(self.packed).teacher_entropy

    @property
    def student_entropy(self) -> Tensor:
        """``[N]`` H_s."""
        return RowStatistics(self.packed).student_entropy

    @property
    def forward_kl(self) -> Tensor:
        """``[N]`` the full forward KL."""
        return RowStatistics(self.packed).forward_kl

    @property
    def reverse_kl(self) -> Tensor:
        """``[N]`` the full reverse KL."""
        return RowStatistics(self.packed).reverse_kl

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that there are, in the order of the fields."""
        tensors = (self.packed, self.gate, self.reverse, self.forward, self.loss)
        return tensors if self.token_log_probs is None else (*tensors, self.token_log_probs)

    @classmethod
    def empty(cls, problem: Problem) -> Seen:
        weights, n = problem.weights, len(problem.weights)
        token = None if problem.tokens.token_ids is None else weights.new_zeros(n, 2)
        if problem.fused and problem.index is None and not problem.gates_first:  # chunked.py fills all of it
            packed, gate = weights.new_empty(n, 8), torch.empty_like(weights)
        else:
            packed, gate = RowStatistics.empty(n, weights.dtype, weights.device).packed, torch.zeros_like(weights)
        # The fused kernel leaves halves and losses to chunked.with_losses.
        reverse, forward, loss = (gate if problem.fused else torch.zeros_like(weights) for _ in range(3))
        return cls(packed, gate, reverse, forward, loss, token)

    def put(self, rows: Rows, statistics: RowStatistics, gate: Tensor, terms: Terms | None) -> None:
        """Notes what was seen of one chunk; without terms, its halves are not known yet."""
        if isinstance(rows, slice) and len(gate) == len(self.gate):  # of all tokens: nothing is copied
            self.packed, self.gate = statistics.packed, gate
        else:
            self.packed[rows], self.gate[rows] = statistics.packed, gate
        if self.token_log_probs is not None and statistics.token_log_probs is not None:
            self.token_log_probs[rows] = statistics.token_log_probs
        if terms is not None:
            self.reverse[rows], self.forward[rows], self.loss[rows] = terms.reverse, terms.forward, terms.loss
