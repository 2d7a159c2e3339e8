"""The order in which blocks of logits come and go: "chunked" by tokens, "recompute" by slices of the vocabulary.

chunked                                     recompute
             V                                           V
    ┌───────────────────┐                       ┌────┬────┬────┬────┐
    │ ───────────────►  │ chunk 1               │ │  │ │  │ │  │ │  │   statistics of every slice, merged;
  N ├───────────────────┤                     N │ ▼  │ ▼  │ ▼  │ ▼  │   then every slice once more,
    │ ───────────────►  │ chunk 2               │    │    │    │    │   for the gradient
    └───────────────────┘                       └────┴────┴────┴────┘
F(3·D_s + D_t) flops, gradient while the    F(4·D_s + 2·D_t) flops, the logits are projected
chunk's logits are alive                    again in backward
"""

from __future__ import annotations

from .. import tensors
from ..row_math.statistics import RowStatistics
from .blocks import Block, Chunk
from .first_visit import FirstVisit, gate_of
from .loss_terms import RowGradient
from .masked import COMPACT_BELOW
from .own_columns import block_gradient, token_logits
from .problem import Problem
from .seen import Seen
from .sides import HiddenSide
from .student_gradient import StudentGradient


def chunked_forward(problem: Problem, gradient: StudentGradient) -> Seen:
    """Runs the chunked schedule: returns what was seen of every token, adds the gradient of Σ w·L to ``gradient``."""
    seen = Seen.empty(problem)
    blocks = problem.blocks()
    for rows in problem.chunks():
        chunk = blocks.take(rows)
        chunk_gradient(problem, chunk, chunk.logits(problem.columns), gradient, seen)
    return seen


def chunk_gradient(problem: Problem, chunk: Chunk, block: Block, gradient: StudentGradient, seen: Seen) -> None:
    """Takes a chunk from its logits, a block of whole rows, to its part of the gradient."""
    if not problem.fused:
        general_gradient(problem, chunk, block, first_visit(problem, chunk, block), gradient, seen)
        return
    # Looked up first: the gradient may take the logits' memory.
    token = None if problem.tokens.token_ids is None else token_logits(problem, block, chunk.rows)
    out = gradient.target(chunk.rows, problem.columns, block.student)
    combine = problem.objective.combination
    packed, gate, loss = problem.functions.row_loss_and_gradient(
        *block,
        problem.weights[chunk.rows],
        problem.objective.gate_threshold(problem.vocab_size),
        list(combine),
        problem.transforms,
        out,
    )
    statistics = RowStatistics(packed)
    seen.put(chunk.rows, statistics if token is None else statistics.with_token(*token), gate, loss, combine)
    if problem.one_chunk:
        chunk.blocks.give_back(block, out)
    gradient.begin(chunk.rows, chunk.student)
    gradient.add(problem.columns, out)
    gradient.end()


def first_visit(problem: Problem, chunk: Chunk, block: Block) -> FirstVisit:
    """Visits a chunk's logits once, before anything is known of its gates."""
    visited = FirstVisit.empty(problem, len(block.student))
    visited.see(problem, problem.tokens.take(chunk.rows), problem.columns, block, with_top_k=False)
    return visited


def general_gradient(
    problem: Problem, chunk: Chunk, block: Block, visited: FirstVisit, gradient: StudentGradient, seen: Seen
) -> None:
    """Takes a chunk under any objective from its first visit to its part of the gradient.

    The logits are alive between the statistics and the gradient, so that whatever has to look at the numbers can.
    """
    rows = chunk.rows
    tokens, weights = problem.tokens.take(rows), problem.weights[rows]
    if problem.objective.skews is not None:
        visited.see_mixture(problem, block)
        visited.mixture_across_ranks(problem)
    statistics = visited.known_statistics(tokens)
    gate = gate_of(problem, statistics, tokens, weights)
    visited.see_top_k(problem, block, gate)
    terms = visited.terms(problem, statistics, gate, tokens, weights)
    seen.put(rows, statistics, gate, terms.loss, (terms.reverse, terms.forward))

    of_rows = RowGradient(statistics.packed, terms.coefficients, terms.own).times(weights)
    taken = chunk.student
    if isinstance(problem.student, HiddenSide) and tensors.readable(weights):
        # Rows without a gradient, such as clipped ones, are left out of the products.
        alive = of_rows.alive().nonzero().squeeze(1)
        if len(alive) <= COMPACT_BELOW * len(weights):
            rows = alive + rows.start if isinstance(rows, slice) else rows[alive]
            block.student, block.teacher = block.student[alive], block.teacher[alive]
            taken, of_rows = taken[alive], of_rows.take(alive)
    out = gradient.target(rows, problem.columns, block.student)
    block_gradient(problem, block, 0, of_rows, out)
    if problem.one_chunk:
        chunk.blocks.give_back(block, out)
    gradient.begin(rows, taken)
    gradient.add(problem.columns, out)
    gradient.end()
