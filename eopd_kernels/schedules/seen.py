"""Seen: what a forward pass leaves of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_math.formulas import Combine, gated_halves
from ..row_math.statistics import RowStatistics
from .problem import Problem
from .sides import Rows


@dataclass(eq=False)
class Seen:
    """What a forward pass leaves of all N tokens; 0 (statistics: empty) for those that were not visited.

    Args:
        packed: ``[N, 8]`` the statistics.
        gate: ``[N]`` how far it is open.
        loss: ``[N]`` c_r·R + c_f·F + λ·C.
        halves: ``[N]`` R and F, 0 where they have no weight; or the weights of full halves, which are computed when
            they are read.
        token_log_probs: ``[N, 2]`` log p(y) and log q(y) of the sampled tokens, or None where there are none.
    """

    packed: Tensor
    gate: Tensor
    loss: Tensor
    halves: tuple[Tensor, Tensor] | Combine
    token_log_probs: Tensor | None = None

    @property
    def reverse(self) -> Tensor:
        """``[N]`` R."""
        return self._halves()[0]

    @property
    def forward(self) -> Tensor:
        """``[N]`` F."""
        return self._halves()[1]

    def _halves(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.halves, Combine):
            return gated_halves(RowStatistics(self.packed), self.gate, self.halves)
        return self.halves

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
        """Returns the tensors that there are, for :meth:`of_tensors`: five, and with sampled tokens a sixth."""
        tensors = (self.packed, self.gate, self.loss, *self._halves())
        return tensors if self.token_log_probs is None else (*tensors, self.token_log_probs)

    @classmethod
    def of_tensors(cls, packed: Tensor, gate: Tensor, loss: Tensor, *rest: Tensor) -> Seen:
        reverse, forward, *token = rest
        return cls(packed, gate, loss, (reverse, forward), *token)

    @classmethod
    def empty(cls, problem: Problem) -> Seen:
        weights, n = problem.weights, len(problem.weights)
        token = None if problem.tokens.token_ids is None else weights.new_zeros(n, 2)
        of_all = problem.index is None and not problem.gates_first  # chunks have all tokens
        if of_all and n and problem.one_chunk:
            return cls(weights, weights, weights, (weights, weights), token)  # put() exchanges them for the chunk's
        make = weights.new_empty if of_all else weights.new_zeros
        packed = weights.new_empty(n, 8) if of_all else RowStatistics.empty(n, weights.dtype, weights.device).packed
        halves = problem.objective.combination if problem.fused else (make(n), make(n))
        return cls(packed, make(n), make(n), halves, token)

    def put(
        self,
        rows: Rows,
        statistics: RowStatistics,
        gate: Tensor,
        loss: Tensor | None = None,
        halves: tuple[Tensor, Tensor] | Combine | None = None,
    ) -> None:
        """Notes what is known of one chunk."""
        if self.token_log_probs is not None and statistics.token_log_probs is not None:
            self.token_log_probs[rows] = statistics.token_log_probs
        if isinstance(rows, slice) and len(gate) == len(self.gate) and loss is not None and halves is not None:
            self.packed, self.gate, self.loss, self.halves = statistics.packed, gate, loss, halves
            return
        pairs = [(self.packed, statistics.packed), (self.gate, gate)]
        if loss is not None:
            pairs.append((self.loss, loss))
        if halves is not None and not isinstance(halves, Combine) and not isinstance(self.halves, Combine):
            pairs += zip(self.halves, halves, strict=True)
        if isinstance(rows, slice):  # one launch on a GPU
            torch._foreach_copy_([of_all[rows] for of_all, _ in pairs], [of_rows for _, of_rows in pairs])
        else:
            for of_all, of_rows in pairs:
                of_all[rows] = of_rows
