"""FirstVisit: what the first visit of some rows leaves behind, collected slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..inputs.record import Tokens
from ..objective.gates import gate_values
from ..objective.halves import TopK
from ..row_math.mixture import MixtureStatistics
from ..row_math.statistics import RowStatistics
from .blocks import Block
from .likeliest import Likeliest
from .loss_terms import Terms, terms_of
from .own_columns import transformed_at
from .problem import Problem
from .sparse_halves import Columns


@dataclass(eq=False)
class FirstVisit:
    """What the first visit of n rows leaves behind. z are transformed logits.

    Args:
        packed: ``[n, 8]`` the statistics.
        mixture: ``[n, 4]`` of a skewed half, else None.
        token_student, token_teacher: ``[n, 1]`` z of the sampled token, or None.
        tops: of each side that a top-k half asks for, its likeliest entries.
    """

    packed: Tensor
    mixture: Tensor | None = None
    token_student: Tensor | None = None
    token_teacher: Tensor | None = None
    tops: dict[str, Likeliest] = field(default_factory=dict)

    @classmethod
    def empty(cls, problem: Problem, n: int) -> FirstVisit:
        """Returns the state of n rows of which nothing has been seen yet."""
        weights, objective = problem.weights, problem.objective

        def numbers(k: int, value: float) -> Tensor:
            return weights.new_full((n, k), value)

        figures = cls(RowStatistics.empty(n, weights.dtype, weights.device).packed)
        if objective.skews is not None:
            figures.mixture = numbers(4, 0.0)
        if problem.tokens.token_ids is not None:
            figures.token_student, figures.token_teacher = numbers(1, -torch.inf), numbers(1, -torch.inf)
        for of, k in objective.top_k.items():
            k = k if problem.tokens.top_ids is None else problem.tokens.top_ids.shape[1]
            figures.tops[of] = Likeliest.empty(of, n, k, weights)
        return figures

    def put(self, rows: Any, of_rows: FirstVisit) -> None:
        """Overwrites some of the rows."""
        for mine, new in zip(self.tensors().values(), of_rows.tensors().values(), strict=True):
            if mine is not None:
                mine[rows] = new
        for of, top in self.tops.items():
            top.put(rows, of_rows.tops[of])

    def take(self, rows: Any) -> FirstVisit:
        """Returns some of the rows: a slice or an index."""
        taken: dict[str, Any] = {name: None if t is None else t[rows] for name, t in self.tensors().items()}
        return FirstVisit(**taken, tops={of: top.take(rows) for of, top in self.tops.items()})

    def tensors(self) -> dict[str, Any]:
        """Returns the tensors, or None, by the names of their fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tops"}

    def see(self, problem: Problem, tokens: Tokens, columns: slice, block: Block, *, with_top_k: bool) -> None:
        """Takes up a block of logits, and with ``with_top_k`` looks for a side's likeliest entries as well."""
        part = RowStatistics(problem.functions.row_statistics(*block, problem.transforms))
        whole = columns.stop - columns.start == problem.student.local_vocab_size
        self.packed = part.packed if whole else RowStatistics(self.packed).merge(part).packed
        of_student, of_teacher = problem.transforms[:3], problem.transforms[3:]
        start = problem.offset + columns.start
        if self.token_student is not None and self.token_teacher is not None:
            assert tokens.token_ids is not None
            ids = tokens.token_ids.unsqueeze(1)
            self.token_student = transformed_at(block.student, ids, start, of_student, self.token_student)
            self.token_teacher = transformed_at(block.teacher, ids, start, of_teacher, self.token_teacher)
        if self.tops and tokens.top_ids is not None:
            served = self.tops["teacher"]
            served.ids = tokens.top_ids
            served.student = transformed_at(block.student, served.ids, start, of_student, served.student)
        elif with_top_k:
            for top in self.tops.values():
                top.see(problem, block, start)

    def across_ranks(self, problem: Problem, tokens: Tokens) -> Iterator[None]:
        """Turns the numbers of this rank's columns into those of whole rows, the same on each rank.

        The maxima over the ranks come first, then the sums, recentred to them. A generator: it yields whenever
        something travels, so that a schedule can do something else meanwhile.
        """
        shard = problem.shard
        if shard is None:
            return
        # Whatever has one value on one rank and −inf on the others travels with the maxima.
        served = self.tops["teacher"].student if self.tops and tokens.top_ids is not None else None
        parts = [p for p in (self.packed[:, 0:3:2], self.token_student, self.token_teacher, served) if p is not None]
        maxima = torch.cat(parts, 1)
        travelling = shard.maximum(maxima)
        yield
        travelling.wait()
        student_max, teacher_max = maxima[:, 0], maxima[:, 1]
        sums = RowStatistics(self.packed).recentre(student_max, teacher_max)
        travelling = shard.sum(sums)
        yield
        travelling.wait()
        self.packed = RowStatistics.centred_on(student_max, teacher_max, sums).packed
        rest = iter(maxima[:, 2:].split([p.shape[1] for p in parts[1:]], 1))
        if self.token_student is not None:
            self.token_student, self.token_teacher = next(rest), next(rest)
        if served is not None:
            self.tops["teacher"].student = next(rest)

    def mixture_across_ranks(self, problem: Problem) -> None:
        """Sums over the ranks what each saw of the mixtures."""
        if problem.shard is not None and self.mixture is not None:
            problem.shard.sum(self.mixture).wait()

    def top_k_across_ranks(self, problem: Problem) -> None:
        """Finds the likeliest entries of whole rows among those of each rank."""
        if problem.tokens.top_ids is None:
            for top in self.tops.values():
                top.across_ranks(problem)

    def see_mixture(self, problem: Problem, block: Block) -> None:
        """Takes up a block of logits once more for the mixtures, when the statistics are those of whole rows."""
        assert self.mixture is not None and problem.objective.skews is not None
        skews = list(problem.objective.skews)
        self.mixture += problem.functions.row_mixture(*block, self.packed, skews, problem.transforms)

    def see_top_k(self, problem: Problem, block: Block, gate: Tensor) -> None:
        """Looks for a side's likeliest entries in whole rows.

        On a CPU only where a half that asks for them has a weight; elsewhere the number of such rows would have to
        travel to the host first.
        """
        if problem.tokens.top_ids is not None:
            return
        for of, top in self.tops.items():
            rows: Any = slice(None)
            if tensors.readable(gate):
                rows = asked_for(problem, of, gate).nonzero().squeeze(1)
            k = top.ids.shape[1]
            if isinstance(rows, Tensor) and len(rows) < len(gate):
                for row in rows.tolist():
                    one = slice(row, row + 1)
                    of_row = Block(*(side[one] for side in block))
                    top.put(one, Likeliest.found(of, problem, of_row, k, problem.offset))
            else:
                top = self.tops[of] = Likeliest.found(of, problem, block, k, problem.offset)
            if problem.shard is not None:
                of_rows = top.take(rows)
                of_rows.across_ranks(problem)
                top.put(rows, of_rows)

    def known_statistics(self, tokens: Tokens) -> RowStatistics:
        """Returns the statistics of whole rows, with the sampled tokens' log-probabilities where there are such tokens.

        Of a teacher without logits its entropy is known and nothing else: its fields are those of a row with that
        entropy, and both KLs are NaN.
        """
        statistics = RowStatistics(self.packed if tokens.teacher_entropy is None else self._of_student(tokens))
        if self.token_student is None or self.token_teacher is None:
            return statistics
        return statistics.with_token(self.token_student, self.token_teacher, tokens.teacher_token_log_probs)

    def _of_student(self, tokens: Tokens) -> Tensor:
        """Returns the statistics ``[n, 8]`` of a row of which the teacher's entropy is known and nothing else of it."""
        assert tokens.teacher_entropy is not None
        packed = self.packed.clone()
        packed[:, 2] = packed[:, 0]  # the student's block stands in for the teacher's: no exponential of it overflows
        packed[:, 3].fill_(1.0)
        packed[:, 4] = -tokens.teacher_entropy
        packed[:, 5::2].fill_(torch.nan)
        return packed

    def terms(
        self, problem: Problem, statistics: RowStatistics, gate: Tensor, tokens: Tokens, weights: Tensor
    ) -> Terms:
        """Returns the rows' loss and the terms of its gradient, now that their gates are known."""
        mixture = None if self.mixture is None else MixtureStatistics(self.mixture)
        used = (weights != 0).unsqueeze(1)
        token, tops = None, {}
        if problem.objective.needs_token:
            assert tokens.token_ids is not None and statistics.token_log_probs is not None
            log_p, log_q = statistics.token_log_probs.split(1, 1)
            token = Columns(tokens.token_ids.unsqueeze(1), used, log_p, log_q)
        for of, top in self.tops.items():
            given, log_p = tokens.top_log_probs, statistics.student_log_probs(top.student)
            log_q = statistics.teacher_log_probs(top.teacher) if given is None else given
            present = (log_q if of == "teacher" else log_p) != -torch.inf
            present = present if tokens.top_present is None else tokens.top_present
            tops[of] = Columns(top.ids, present & used, log_p, log_q)
        return terms_of(problem.objective, statistics, gate, tokens, mixture=mixture, token=token, tops=tops)


def asked_for(problem: Problem, of: str, gate: Tensor) -> Tensor:
    """Returns in which rows a half with a weight looks at the likeliest entries of this side, ``[n]`` bool."""
    objective, asked = problem.objective, torch.zeros_like(gate, dtype=torch.bool)
    for half, weight in zip((objective.reverse, objective.forward), objective.combination(gate), strict=True):
        if isinstance(half, TopK) and half.of == of:
            asked |= weight != 0
    return asked


def gate_of(problem: Problem, statistics: RowStatistics, tokens: Tokens, weights: Tensor) -> Tensor:
    """Returns how far each row's gate is open, ``[n]``: as the caller said, else by the objective."""
    if tokens.gate is not None:
        return torch.where(weights == 0, 0.0, tokens.gate)
    return gate_values(problem.objective.gate, statistics, problem.vocab_size, weights)
