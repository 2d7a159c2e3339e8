"""FirstVisit: what the first visit of some rows leaves behind, collected slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import tensors
from ..inputs.record import Tokens
from ..objective.gates import gate_values
from ..objective.halves import Sampled, TopK
from ..row_math.mixture import MixtureStatistics
from ..row_math.statistics import RowStatistics
from ..row_math.top_k import top_k
from .blocks import Block
from .loss_terms import Columns, Terms, terms_of
from .own_columns import transformed_at
from .problem import Problem


@dataclass(eq=False)
class FirstVisit:
    """What the first visit of n rows leaves behind. z are transformed logits.

    Args:
        packed: ``[n, 8]`` the statistics.
        mixture: ``[n, 4]`` of a skewed half, else None.
        token_student, token_teacher: ``[n, 1]`` z of the sampled token, or None.
        top_ids, top_student, top_teacher: ``[n, k]`` the teacher's likeliest entries and both sides' z there, or None.
    """

    packed: Tensor
    mixture: Tensor | None = None
    token_student: Tensor | None = None
    token_teacher: Tensor | None = None
    top_ids: Tensor | None = None
    top_student: Tensor | None = None
    top_teacher: Tensor | None = None

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
        if isinstance(objective.forward, TopK):
            k = objective.forward.k if problem.tokens.top_ids is None else problem.tokens.top_ids.shape[1]
            figures.top_ids = torch.zeros(n, k, dtype=torch.int64, device=weights.device)
            figures.top_student, figures.top_teacher = numbers(k, -torch.inf), numbers(k, -torch.inf)
        return figures

    def put(self, rows: Any, of_rows: FirstVisit) -> None:
        """Overwrites some of the rows."""
        for field in fields(self):
            mine, new = getattr(self, field.name), getattr(of_rows, field.name)
            if mine is not None:
                mine[rows] = new

    def take(self, rows: Any) -> FirstVisit:
        """Returns some of the rows: a slice or an index."""
        of_rows: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: None if t is None else t[rows] for name, t in of_rows.items()}
        return FirstVisit(**taken)

    def see(self, problem: Problem, tokens: Tokens, columns: slice, block: Block, *, with_top_k: bool) -> None:
        """Takes up a block of logits, and with ``with_top_k`` looks for the teacher's likeliest entries as well."""
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
        if self.top_student is not None and tokens.top_ids is not None:
            self.top_ids = tokens.top_ids
            self.top_student = transformed_at(block.student, self.top_ids, start, of_student, self.top_student)
        elif self.top_student is not None and with_top_k:
            self._merge_top(*likeliest(problem, block, self.top_student.shape[1], start))

    def across_ranks(self, problem: Problem, tokens: Tokens) -> Iterator[None]:
        """Turns the numbers of this rank's columns into those of whole rows, the same on each rank.

        The maxima over the ranks come first, then the sums, recentred to them. A generator: it yields whenever
        something travels, so that a schedule can do something else meanwhile.
        """
        shard = problem.shard
        if shard is None:
            return
        # Whatever has one value on one rank and −inf on the others travels with the maxima.
        served = self.top_student if tokens.top_ids is not None else None
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
            self.top_student = next(rest)

    def mixture_across_ranks(self, problem: Problem) -> None:
        """Sums over the ranks what each saw of the mixtures."""
        if problem.shard is not None and self.mixture is not None:
            problem.shard.sum(self.mixture).wait()

    def top_k_across_ranks(self, problem: Problem) -> None:
        """Finds the likeliest entries of whole rows among those of each rank: one message, ids in numbers' bits."""
        if problem.shard is None or self.top_ids is None or problem.tokens.top_ids is not None:
            return
        assert self.top_student is not None and self.top_teacher is not None
        dtype = self.top_teacher.dtype
        as_ids = torch.int32 if dtype == torch.float32 else torch.int64
        k = self.top_ids.shape[1]
        message = torch.cat([self.top_ids.to(as_ids).view(dtype), self.top_student, self.top_teacher], 1)  # [n, 3k]
        ids, student, teacher = torch.stack(problem.shard.gathered(message), 1).unflatten(2, (3, k)).unbind(2)
        self.top_teacher, best = teacher.flatten(1).topk(k, 1)
        self.top_student = student.flatten(1).gather(1, best)
        self.top_ids = ids.flatten(1).contiguous().view(as_ids).long().gather(1, best)

    def see_mixture(self, problem: Problem, block: Block) -> None:
        """Takes up a block of logits once more for the mixtures, when the statistics are those of whole rows."""
        assert self.mixture is not None and problem.objective.skews is not None
        skews = list(problem.objective.skews)
        self.mixture += problem.functions.row_mixture(*block, self.packed, skews, problem.transforms)

    def see_top_k(self, problem: Problem, block: Block, gate: Tensor) -> None:
        """Looks for the teacher's likeliest entries in whole rows.

        On a CPU only where the gate is open; elsewhere the number of such rows would have to travel to the host first.
        """
        if self.top_student is None or problem.tokens.top_ids is not None:
            return
        k = self.top_student.shape[1]
        opened = gate.nonzero().squeeze(1) if tensors.readable(gate) else slice(None)
        if isinstance(opened, Tensor) and len(opened) < len(gate):
            for row in opened.tolist():
                one = slice(row, row + 1)
                ids, z_s, z_t = likeliest(problem, Block(*(side[one] for side in block)), k, problem.offset)
                self.top_ids[one], self.top_student[one], self.top_teacher[one] = ids, z_s, z_t  # type: ignore[index]
        else:
            self.top_ids, self.top_student, self.top_teacher = likeliest(problem, block, k, problem.offset)
        if problem.shard is not None:
            of_open = self.take(opened)
            of_open.top_k_across_ranks(problem)
            self.put(opened, of_open)

    def _merge_top(self, ids: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Keeps the k likeliest of the entries known and of the entries ``[n, j]`` of another slice."""
        assert self.top_ids is not None and self.top_student is not None and self.top_teacher is not None
        all_ids = torch.cat([self.top_ids, ids], 1)
        all_student = torch.cat([self.top_student, student], 1)
        self.top_teacher, best = torch.cat([self.top_teacher, teacher], 1).topk(self.top_ids.shape[1], 1)
        self.top_ids, self.top_student = all_ids.gather(1, best), all_student.gather(1, best)

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
        token = top = None
        if isinstance(problem.objective.reverse, Sampled):
            assert tokens.token_ids is not None and statistics.token_log_probs is not None
            log_p, log_q = statistics.token_log_probs.split(1, 1)
            token = Columns(tokens.token_ids.unsqueeze(1), used, log_p, log_q)
        if self.top_ids is not None and self.top_student is not None and self.top_teacher is not None:
            given = tokens.top_log_probs
            log_q = statistics.teacher_log_probs(self.top_teacher) if given is None else given
            present = log_q != -torch.inf if tokens.top_present is None else tokens.top_present
            top = Columns(self.top_ids, present & used, statistics.student_log_probs(self.top_student), log_q)
        return terms_of(problem.objective, statistics, gate, tokens, mixture=mixture, token=token, top=top)


def likeliest(problem: Problem, block: Block, k: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the teacher's k likeliest entries in a block ``[n, w]``: ids and both sides' z there, −inf beyond w."""
    scale = problem.transforms[3]
    _, local = top_k(block.teacher if scale > 0 else -block.teacher, min(k, block.teacher.shape[1]))
    into = problem.weights.new_full(local.shape, -torch.inf)
    found = (
        transformed_at(block.student, local, 0, problem.transforms[:3], into),
        transformed_at(block.teacher, local, 0, problem.transforms[3:], into),
    )
    missing = (0, k - local.shape[1])
    z_s, z_t = (pad(z, missing, value=-torch.inf) for z in found)
    return pad(local + start, missing), z_s, z_t


def gate_of(problem: Problem, statistics: RowStatistics, tokens: Tokens, weights: Tensor) -> Tensor:
    """Returns how far each row's gate is open, ``[n]``: as the caller said, else by the objective."""
    if tokens.gate is not None:
        return torch.where(weights == 0, 0.0, tokens.gate)
    return gate_values(problem.objective.gate, statistics, problem.vocab_size, weights)
