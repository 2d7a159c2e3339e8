"""The schedule "recompute": slices of the vocabulary are visited in forward, and again in backward."""

from __future__ import annotations

from .first_visit import FirstVisit, gate_of
from .loss_terms import RowGradient, Terms
from .own_columns import block_gradient
from .problem import Problem
from .seen import Seen
from .sides import Rows
from .student_gradient import StudentGradient


def recompute_forward(problem: Problem) -> tuple[Seen, Terms]:
    """Visits every slice of every chunk: returns what was seen, and the terms of the gradient."""
    figures = FirstVisit.empty(problem, len(problem.weights))
    blocks = problem.blocks()
    for rows in problem.chunks():
        chunk, tokens = blocks.take(rows), problem.tokens.take(rows)
        of_chunk = FirstVisit.empty(problem, len(chunk.student))
        for columns in problem.slices():
            of_chunk.see(problem, tokens, columns, chunk.logits(columns), with_top_k=True)
        figures.put(rows, of_chunk)
    visited: Rows = slice(None) if problem.index is None else problem.index
    whole = figures.take(visited)
    for _ in whole.across_ranks(problem, problem.tokens.take(visited)):
        pass
    whole.top_k_across_ranks(problem)
    figures.put(visited, whole)
    if problem.objective.skews is not None:
        for rows in problem.chunks():
            chunk, of_chunk = blocks.take(rows), figures.take(rows)
            for columns in problem.slices():
                of_chunk.see_mixture(problem, chunk.logits(columns))
            figures.put(rows, of_chunk)
        whole = figures.take(visited)
        whole.mixture_across_ranks(problem)
        figures.put(visited, whole)
    statistics = figures.known_statistics(problem.tokens)
    gate = gate_of(problem, statistics, problem.tokens, problem.weights)
    terms = figures.terms(problem, statistics, gate, problem.tokens, problem.weights)
    halves = terms.reverse, terms.forward
    return Seen(statistics.packed, gate, terms.loss, halves, statistics.token_log_probs), terms


def recompute_backward(problem: Problem, of_rows: RowGradient, gradient: StudentGradient) -> None:
    """Visits every slice once more, and adds the gradient ``of_rows``, of all tokens, to ``gradient``."""
    blocks = problem.blocks()
    for rows in problem.chunks():
        chunk = blocks.take(rows)
        gradient.begin(rows, chunk.student)
        of_chunk = of_rows.take(rows)
        for columns in problem.slices():
            block = chunk.logits(columns)
            out = gradient.target(rows, columns, block.student)
            block_gradient(problem, block, columns.start, of_chunk, out)
            gradient.add(columns, out)
        gradient.end()
