"""The chunked schedule where a vocabulary is spread over ranks: what travels is never waited for at once.

    compute   │ logits 0 ····· │ logits 1   │ gradient 0 │ ·· │ logits 2   │ gradient 1 │ ·· │ gradient 2
    travels   │      maxima 0  │   sums 0   │  maxima 1  │ ·· │   sums 1   │  maxima 2  │ ·· │
              │                │            │            │ dX 0 ────►      │            │ dX 1 ────►

"logits" are both sides' products and the first visit of this rank's columns, "gradient" the second visit and the
products behind dX and dW. A chunk's maxima travel during the gradient of the chunk before, its sums during the logits
of the chunk after, its dX until the next chunk's is ready; at each ·· maxima have come and sums leave. So two chunks'
blocks are alive, each with half of the workspace. What a skewed or a top-k half exchanges comes within "gradient" and
is waited for there. Every rank starts its collectives in this one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .blocks import Block, Blocks, Chunk
from .chunked import first_visit, general_gradient
from .first_visit import FirstVisit
from .problem import Problem
from .seen import Seen
from .sides import Rows
from .student_gradient import StudentGradient


class Visited(NamedTuple):
    """A chunk after its first visit, whose numbers are on their way to become those of whole rows."""

    chunk: Chunk
    block: Block  # of all columns of this rank
    seen: FirstVisit
    travelling: Iterator[None]

    @classmethod
    def begin(cls, problem: Problem, blocks: Blocks, rows: Rows) -> Visited:
        """Visits a chunk, and starts to send its maxima."""
        chunk = blocks.take(rows)
        block = chunk.logits(problem.columns)
        seen = first_visit(problem, chunk, block)
        visited = cls(chunk, block, seen, seen.across_ranks(problem, problem.tokens.take(rows)))
        next(visited.travelling)
        return visited

    def send_sums(self) -> None:
        """Starts to send the sums, once the maxima have come."""
        next(self.travelling)

    def finish(self, problem: Problem, gradient: StudentGradient, seen: Seen) -> None:
        """Takes the gradient, once the sums have come."""
        next(self.travelling, None)
        general_gradient(problem, self.chunk, self.block, self.seen, gradient, seen)


def chunked_forward_across_ranks(problem: Problem, gradient: StudentGradient) -> Seen:
    """Runs the chunked schedule for this rank's entries: returns what was seen, adds the gradient to ``gradient``."""
    seen = Seen.empty(problem)
    chunks = list(problem.chunks())
    blocks = [problem.blocks() for _ in chunks[:2]]
    before: Visited | None = None
    for i, rows in enumerate(chunks):
        this = Visited.begin(problem, blocks[i % 2], rows)
        if before is not None:
            before.finish(problem, gradient, seen)
        this.send_sums()
        before = this
    if before is not None:
        before.finish(problem, gradient, seen)
    return seen
