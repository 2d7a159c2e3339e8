"""Likeliest: the k likeliest entries of one side in some rows, found block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..row_math.top_k import top_k
from .blocks import Block
from .own_columns import transformed_at
from .problem import Problem


@dataclass(eq=False)
class Likeliest:
    """The k likeliest entries of one side in n rows, the likeliest first, and both sides' transformed logits there.

    Args:
        of: whose they are, ``"teacher"`` or ``"student"``.
        ids: ``[n, k]``; 0 where nothing is known yet.
        student, teacher: ``[n, k]`` transformed logits; −inf where nothing is known yet.
    """

    of: str
    ids: Tensor  # [n, k]
    student: Tensor  # [n, k]
    teacher: Tensor  # [n, k]

    @classmethod
    def empty(cls, of: str, n: int, k: int, like: Tensor) -> Likeliest:
        """Returns n rows of which nothing has been seen yet, with the dtype and device of ``like``."""
        ids = torch.zeros(n, k, dtype=torch.int64, device=like.device)
        return cls(of, ids, *(like.new_full((n, k), -torch.inf) for _ in range(2)))

    @classmethod
    def found(cls, of: str, problem: Problem, block: Block, k: int, start: int) -> Likeliest:
        """Returns those of a block ``[n, w]`` that begins at entry ``start``; −inf beyond w."""
        ranked = block.teacher if of == "teacher" else block.student
        scale = problem.transforms[3 if of == "teacher" else 0]
        _, local = top_k(ranked if scale > 0 else -ranked, min(k, ranked.shape[1]))
        into = problem.weights.new_full(local.shape, -torch.inf)
        z_s = transformed_at(block.student, local, 0, problem.transforms[:3], into)
        z_t = transformed_at(block.teacher, local, 0, problem.transforms[3:], into)
        missing = (0, k - local.shape[1])
        return cls(of, pad(local + start, missing), *(pad(z, missing, value=-torch.inf) for z in (z_s, z_t)))

    def see(self, problem: Problem, block: Block, start: int) -> None:
        """Takes up a slice of the vocabulary, whose first column is entry ``start``."""
        new = Likeliest.found(self.of, problem, block, self.ids.shape[1], start)
        self.choose(*(torch.cat(pair, 1) for pair in zip(self.tensors(), new.tensors(), strict=True)))

    def choose(self, ids: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Keeps the k likeliest of the entries given, ``[n, j]`` each."""
        best = (teacher if self.of == "teacher" else student).topk(self.ids.shape[1], 1).indices
        self.ids, self.student, self.teacher = (t.gather(1, best) for t in (ids, student, teacher))

    def across_ranks(self, problem: Problem) -> None:
        """Finds the likeliest of whole rows among those of each rank: one message, ids in numbers' bits."""
        if problem.shard is None:
            return
        dtype = self.teacher.dtype
        as_ids = torch.int32 if dtype == torch.float32 else torch.int64
        message = torch.cat([self.ids.to(as_ids).view(dtype), self.student, self.teacher], 1)  # [n, 3k]
        parts = torch.stack(problem.shard.gathered(message), 1).unflatten(2, (3, -1)).unbind(2)
        ids, student, teacher = (part.flatten(1) for part in parts)  # [n, ranks·k]
        self.choose(ids.contiguous().view(as_ids).long(), student, teacher)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.student, self.teacher

    def take(self, rows: Any) -> Likeliest:
        """Returns some of the rows: a slice or an index."""
        return Likeliest(self.of, *(t[rows] for t in self.tensors()))

    def put(self, rows: Any, of_rows: Likeliest) -> None:
        """Overwrites some of the rows."""
        for mine, new in zip(self.tensors(), of_rows.tensors(), strict=True):
            mine[rows] = new
