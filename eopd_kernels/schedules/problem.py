"""Problem: one call of the loss as rows, in chunks of tokens and slices of the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..distributed.vocabulary import Shard
from ..heads.lm_head import transform
from ..inputs.record import Tokens
from ..objective.objective import Objective
from ..rows import RowFunctions
from .blocks import Blocks, Buffer, pitch
from .sides import Rows, Side
from .workspace import Tiling


@dataclass(eq=False)
class Problem:
    """One call of the loss, as the schedules see it.

    Args:
        student: N rows.
        teacher: N rows, or None where ``tokens`` hold the teacher's likeliest entries and nothing else is known.
        weights: ``[N]`` in the compute dtype, 0 where masked.
        index: ``[M]`` the tokens that count, or None where all N are visited.
        objective: what is minimised.
        tokens: what the caller said of each token.
        functions: the backend's row functions.
        tiling: the shape of a block.
        shard: this rank's part of the vocabulary, or None where it has all of it.
        gates_first: whether a chunk's gates are found before its student is projected (gates_first.py).
    """

    student: Side
    teacher: Side | None
    weights: Tensor
    index: Tensor | None
    objective: Objective
    tokens: Tokens
    functions: RowFunctions
    tiling: Tiling
    shard: Shard | None = None
    gates_first: bool = False

    @property
    def vocab_size(self) -> int:
        """The entries of the vocabulary that are compared, on all ranks together."""
        return self.student.local_vocab_size if self.shard is None else self.shard.vocab_size

    @property
    def offset(self) -> int:
        """The entry of the vocabulary that this rank's first column is."""
        return 0 if self.shard is None else self.shard.offset

    @property
    def columns(self) -> slice:
        """All columns of this rank."""
        return slice(0, self.student.local_vocab_size)

    @property
    def transforms(self) -> list[float]:
        """Scale, softcap and temperature of the student, then of the teacher, as the row functions take them."""
        of_student, of_teacher = self.objective.temperatures
        teacher = self.student if self.teacher is None else self.teacher
        return [*transform(self.student.head, of_student), *transform(teacher.head, of_teacher)]

    def of_open_tokens(self, gate: Tensor) -> Problem:
        """Returns the problem of tokens that were found open: their gates ``[N]`` are not asked for again."""
        if self.objective.hard_gate:  # all that is left is open, which the fused kernel can be told
            return replace(self, objective=replace(self.objective, gate="always"))
        return replace(self, tokens=replace(self.tokens, gate=gate))

    @functools.cached_property
    def fused(self) -> bool:
        """Whether the kernel can set the gate and take the gradient in the visit that finds the statistics."""
        objective, tokens = self.objective, self.tokens
        plain = all(half in ("full", "none") for half in (objective.reverse, objective.forward))
        plain = plain and objective.cross_entropy == 0
        given = (tokens.gate, tokens.reverse_weights, tokens.forward_weights)
        whole_rows = self.shard is None and self.teacher is not None
        return plain and objective.hard_gate and whole_rows and all(t is None for t in given)

    def chunks(self) -> Iterator[Rows]:
        """Yields the chunks of tokens, none larger than the tiling says, each within one run of either side."""
        if self.index is not None:
            yield from (part for part in self.index.split(self.tiling.tokens) if len(part))
            return
        start, stop = 0, len(self.weights)
        while start < stop:
            ends = [start + self.tiling.tokens, stop]
            ends += [(start // side.run + 1) * side.run for side in (self.student, self.teacher) if side is not None]
            yield slice(start, min(ends))
            start = min(ends)

    @functools.cached_property
    def one_chunk(self) -> bool:
        """Whether all tokens are visited at once, so that each block is the only one of its columns."""
        chunks = self.chunks()
        next(chunks, None)
        return next(chunks, None) is None

    def slices(self) -> Iterator[slice]:
        """Yields the slices of this rank's vocabulary."""
        size = self.student.local_vocab_size
        for start in range(0, size, self.tiling.columns):
            yield slice(start, min(start + self.tiling.columns, size))

    @property
    def block(self) -> int:
        """The number of elements in the largest block."""
        return min(self.tiling.tokens, len(self.weights)) * pitch(self.tiling.columns, self.weights.device)

    def blocks(self) -> Blocks:
        """Allocates memory for one block of each side."""
        teacher = None if self.teacher is None else Buffer(self.teacher, self.block)
        return Blocks(Buffer(self.student, self.block), teacher)
