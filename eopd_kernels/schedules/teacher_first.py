"""The statistics of the teacher alone, for gates that are found before the student is projected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.vocabulary import Shard
from ..row_math.statistics import RowStatistics
from .blocks import Buffer
from .first_visit import FirstVisit
from .own_columns import transformed_at
from .problem import Problem
from .sides import Rows


def teacher_statistics(problem: Problem, look: bool) -> RowStatistics:
    """Returns every token's statistics ``[N, 8]`` of the teacher; NaN for the student's and for tokens not visited.

    Without a ``look`` at its logits they hold what is known beforehand.
    """
    teacher, tokens, n = problem.teacher, problem.tokens, len(problem.weights)
    packed = problem.weights.new_full((n, 8), torch.nan)
    token = None if tokens.token_ids is None else packed.new_full((n, 1), torch.nan)  # z of the sampled token
    if teacher is None or not look:
        return FirstVisit(packed, token_student=token, token_teacher=token).known_statistics(tokens)
    buffer = Buffer(teacher, problem.block)
    for rows in problem.chunks():
        taken = teacher.take(rows)
        of_chunk = RowStatistics.empty(len(taken), packed.dtype, packed.device)
        z = packed.new_full((len(taken), 1), -torch.inf)
        for columns in problem.slices():
            logits = buffer.logits(taken, columns)
            of_chunk = of_chunk.merge(RowStatistics(of_teacher(problem, logits)))
            if tokens.token_ids is not None:
                ids, start = tokens.token_ids[rows].unsqueeze(1), problem.offset + columns.start
                z = transformed_at(logits, ids, start, problem.transforms[3:], z)
        packed[rows] = of_chunk.packed
        if token is not None:
            token[rows] = z
    if problem.shard is not None:
        visited: Rows = slice(None) if problem.index is None else problem.index
        packed[visited] = teacher_across_ranks(packed[visited], problem.shard)
        if token is not None:
            of_visited = token[visited].contiguous()
            problem.shard.maximum(of_visited).wait()
            token[visited] = of_visited
    return without_student(packed, token)


def of_teacher(problem: Problem, logits: Tensor) -> Tensor:
    """Returns the statistics ``[n, 8]`` of the teacher's logits ``[n, k]`` against themselves, in the compute dtype."""
    logits = logits.double() if problem.weights.dtype == torch.float64 else logits
    return problem.functions.row_statistics(logits, logits, problem.transforms[3:] * 2)


def without_student(packed: Tensor, token: Tensor | None) -> RowStatistics:
    """Sets the student's part of statistics ``[n, 8]`` to NaN: only the teacher's is known.

    Args:
        token: ``[n, 1]`` the teacher's transformed logits of the sampled tokens, or None.
    """
    packed[:, [0, 1, 5, 6, 7]] = torch.nan
    statistics = RowStatistics(packed)
    return statistics if token is None else statistics.with_token(token, token)  # NaN in the student's place


def teacher_across_ranks(packed: Tensor, shard: Shard) -> Tensor:
    """Merges the teacher's maximum, sum and self over the ranks: 12 bytes of each row travel."""
    packed, maximum = packed.clone(), packed[:, 2].clone()
    shard.maximum(maximum).wait()
    sums = RowStatistics(packed).recentre(maximum, maximum)[:, 1:3].contiguous()  # Z_t and A
    shard.sum(sums).wait()
    packed[:, 2], packed[:, 3], packed[:, 4] = maximum, sums[:, 0], sums[:, 1]
    return packed
