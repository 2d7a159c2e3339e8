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

from torch import Tensor

from .. import tensors
from ..row_math.statistics import RowStatistics
from .blocks import Chunk
from .first_visit import FirstVisit, gate_of
from .loss_terms import alive_rows, scaled, terms_of
from .own_columns import block_gradient
from .problem import Problem
from .seen import Seen
from .sides import HiddenSide
from .student_gradient import StudentGradient

# A chunk of hidden states leaves rows without a gradient out of its products where at most this share is left: copying
# the others' logits together costs 16 bytes each, the products 4·D flops.
COMPACT_BELOW = 0.75


def chunked_forward(problem: Problem, gradient: StudentGradient) -> Seen:
    """Runs the chunked schedule: returns what was seen of every token, adds the gradient of Σ w·L to ``gradient``."""
    seen = Seen.empty(problem)
    blocks = problem.blocks()
    columns = problem.columns
    for rows in problem.chunks():
        chunk = blocks.take(rows)
        chunk_gradient(problem, chunk, *chunk.logits(columns), gradient, seen)
    return with_losses(problem, seen)


def chunk_gradient(
    problem: Problem,
    chunk: Chunk,
    student: Tensor,  # [n, V]
    teacher: Tensor,  # [n, V]
    gradient: StudentGradient,
    seen: Seen,
) -> None:
    """Takes a chunk from its logits to its part of the gradient."""
    if not problem.fused:
        figures = first_figures(problem, chunk, student, teacher)
        general_gradient(problem, chunk, student, teacher, figures, gradient, seen)
        return
    columns = problem.columns
    out = gradient.target(chunk.rows, columns, student)
    packed, gate = problem.functions.row_loss_and_gradient(
        student,
        teacher,
        problem.weights[chunk.rows],
        problem.objective.gate_threshold(problem.vocab_size),
        list(problem.objective.combination),
        problem.transforms,
        out,
    )
    seen.put(chunk.rows, packed, gate, None)
    gradient.begin(chunk.rows, chunk.student)
    gradient.add(columns, out)
    gradient.end()


def with_losses(problem: Problem, seen: Seen) -> Seen:
    """Adds the halves and losses, which the fused kernel leaves to be computed for all tokens at once."""
    if not problem.fused:
        return seen
    terms = terms_of(problem.objective, RowStatistics(seen.packed), None, None, None, seen.gate, problem.tokens)
    return Seen(seen.packed, seen.gate, terms.reverse, terms.forward, terms.loss)


def first_figures(problem: Problem, chunk: Chunk, student: Tensor, teacher: Tensor) -> FirstVisit:
    """Visits a chunk's logits ``[n, V]`` once, before anything is known of its gates."""
    tokens, columns = problem.tokens.take(chunk.rows), problem.columns
    figures = FirstVisit.empty(problem, len(student))
    figures.see(problem, tokens, columns, student, teacher, with_top_k=False)
    return figures


def general_gradient(
    problem: Problem,
    chunk: Chunk,
    student: Tensor,  # [n, V]
    teacher: Tensor,  # [n, V]
    figures: FirstVisit,
    gradient: StudentGradient,
    seen: Seen,
) -> None:
    """Takes a chunk under any objective from its first visit to its part of the gradient.

    The logits are alive between the statistics and the gradient, so that whatever has to look at the numbers can.
    """
    rows, columns = chunk.rows, problem.columns
    tokens, weights = problem.tokens.take(rows), problem.weights[rows]
    if problem.objective.skews is not None:
        figures.see_mixture(problem, student, teacher)
        figures.mixture_across_ranks(problem)
    statistics = figures.known_statistics(tokens)
    gate = gate_of(problem, statistics, tokens, weights)
    figures.see_top_k(problem, student, teacher, gate)
    terms = figures.terms(problem, statistics, gate, tokens, weights)
    seen.put(rows, statistics.packed, gate, terms)

    coefficients, own = scaled(terms.coefficients, terms.own, weights)
    packed, taken = statistics.packed, chunk.student
    if isinstance(problem.student, HiddenSide) and tensors.readable(weights):
        # Rows without a gradient, such as clipped ones, are left out of the products.
        alive = alive_rows(coefficients, own).nonzero().squeeze(1)
        if len(alive) <= COMPACT_BELOW * len(weights):
            rows = alive + rows.start if isinstance(rows, slice) else rows[alive]
            student, teacher, packed, taken = student[alive], teacher[alive], packed[alive], taken[alive]
            coefficients, own = coefficients.take(alive), None if own is None else own.take(alive)
    out = gradient.target(rows, columns, student)
    block_gradient(problem, student, teacher, 0, packed, coefficients, own, out)
    gradient.begin(rows, taken)
    gradient.add(columns, out)
    gradient.end()
