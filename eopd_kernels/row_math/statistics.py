"""RowStatistics: the eight numbers of a row, their merge, and what is derived from them (docs/math.md, "One pass")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = (
    "student_max",
    "student_sum",
    "teacher_max",
    "teacher_sum",
    "teacher_self",
    "teacher_cross",
    "student_self",
    "student_cross",
)


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What one visit of a row of student logits ``z_s`` and teacher logits ``z_t`` leaves behind.

    Every sum is centred on the running maxima ``m_s``, ``m_t``, so that a shift of the logits costs no precision:

    ================ ======================================================
    ``student_max``   m_s
    ``student_sum``   Z_s = Σ exp(z_s − m_s)
    ``teacher_max``   m_t
    ``teacher_sum``   Z_t = Σ exp(z_t − m_t)
    ``teacher_self``  A = Σ exp(z_t − m_t)·(z_t − m_t)
    ``teacher_cross`` P = Σ exp(z_t − m_t)·((z_t − m_t) − (z_s − m_s))
    ``student_self``  B = Σ exp(z_s − m_s)·(z_s − m_s)
    ``student_cross`` Q = Σ exp(z_s − m_s)·((z_s − m_s) − (z_t − m_t))
    ================ ======================================================

    Example::

        def sure_and_apart(statistics):  # a gate of one's own: [N] numbers from the statistics of all tokens
            return (statistics.teacher_entropy < 1.0) & (statistics.reverse_kl > 0.1)

        entropy_aware_kl(torch.randn(3, 50), torch.randn(3, 50), objective=Objective(gate=sure_and_apart))

    Args:
        packed: ``[n, 8]`` fp32 or fp64, the eight numbers of each row in the order of the table.
        token_log_probs: ``[n, 2]`` log p(y) and log q(y) of the sampled tokens, in nats; None without ``token_ids=``.
    """

    packed: Tensor  # [n, 8]
    token_log_probs: Tensor | None = None  # [n, 2]

    @property
    def student_max(self) -> Tensor:
        return self.packed[:, 0]

    @property
    def student_sum(self) -> Tensor:
        return self.packed[:, 1]

    @property
    def teacher_max(self) -> Tensor:
        return self.packed[:, 2]

    @property
    def teacher_sum(self) -> Tensor:
        return self.packed[:, 3]

    @property
    def log_sum_ratio(self) -> Tensor:
        """log(Z_s/Z_t), ``[n]``: one logarithm of the ratio, because the difference of two loses it at a small KL."""
        return torch.log(self.student_sum / self.teacher_sum)

    @property
    def teacher_entropy(self) -> Tensor:
        """H_t = −Σ q log q in nats, ``[n]``."""
        return torch.log(self.teacher_sum) - self.packed[:, 4] / self.teacher_sum

    @property
    def student_entropy(self) -> Tensor:
        """H_s = −Σ p log p in nats, ``[n]``."""
        return torch.log(self.student_sum) - self.packed[:, 6] / self.student_sum

    @property
    def forward_kl(self) -> Tensor:
        """F = Σ q (log q − log p) in nats, ``[n]``; +inf where the student has no mass on a column of the teacher."""
        return self.packed[:, 5] / self.teacher_sum + self.log_sum_ratio

    @property
    def reverse_kl(self) -> Tensor:
        """R = Σ p (log p − log q) in nats, ``[n]``; +inf where the teacher has no mass on a column of the student."""
        return self.packed[:, 7] / self.student_sum - self.log_sum_ratio

    @property
    def student_token_log_prob(self) -> Tensor:
        """log p(y) of the sampled token in nats, ``[n]``; a ValueError where the call has no ``token_ids=``."""
        return self._token_log_prob("student", 0)

    @property
    def teacher_token_log_prob(self) -> Tensor:
        """log q(y) likewise, ``[n]``; NaN where a :class:`TopKTeacher` does not know it."""
        return self._token_log_prob("teacher", 1)

    def _token_log_prob(self, side: str, column: int) -> Tensor:
        if self.token_log_probs is None:
            raise ValueError(f"statistics.{side}_token_log_prob needs token_ids= of the leading shape, got None")
        return self.token_log_probs[:, column]

    def with_token(self, student: Tensor, teacher: Tensor, log_q: Tensor | None = None) -> RowStatistics:
        """The statistics of whole rows with the sampled tokens' log-probabilities: from transformed logits ``[n, 1]``
        of both sides, of the teacher from ``log_q`` [n] where that is given."""
        # At most 0: a logit that is read once more may be a rounding above the maximum that a kernel found.
        of_teacher = self.teacher_log_probs(teacher).clamp(max=0) if log_q is None else log_q.unsqueeze(1)
        return RowStatistics(self.packed, torch.cat([self.student_log_probs(student).clamp(max=0), of_teacher], 1))

    def unknown_where(self, rows: Tensor) -> RowStatistics:
        """The statistics with NaN in the ``rows`` [n] that are True."""
        rows, token = rows.unsqueeze(1), self.token_log_probs
        filled = None if token is None else token.masked_fill(rows, torch.nan)
        return RowStatistics(self.packed.masked_fill(rows, torch.nan), filled)

    def probabilities(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, q and log p − log q of transformed logits ``[n, k]``, some columns of rows that this is the whole of."""
        s = student - finite_centre(self.student_max).unsqueeze(1)
        t = teacher - finite_centre(self.teacher_max).unsqueeze(1)
        p = s.exp() / self.student_sum.unsqueeze(1)
        q = t.exp() / self.teacher_sum.unsqueeze(1)
        return p, q, (s - t) - self.log_sum_ratio.unsqueeze(1)

    def student_log_probs(self, student: Tensor) -> Tensor:
        """log p of transformed logits ``[n, k]``, some columns of rows that this is the whole of."""
        return (student - self.student_max.unsqueeze(1)) - self.student_sum.log().unsqueeze(1)

    def teacher_log_probs(self, teacher: Tensor) -> Tensor:
        """log q of transformed logits ``[n, k]``, some columns of rows that this is the whole of."""
        return (teacher - self.teacher_max.unsqueeze(1)) - self.teacher_sum.log().unsqueeze(1)

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
        """``n`` rows of which nothing has been seen yet: maxima −inf, sums 0. Merging with it changes nothing."""
        packed = torch.zeros(n, 8, dtype=dtype, device=device)
        packed[:, 0:3:2].fill_(-torch.inf)
        return cls(packed)

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> RowStatistics:
        """The statistics of the columns given: ``student`` and ``teacher`` are transformed logits ``[n, k]``, k ≥ 1."""
        student_max = student.amax(1)
        teacher_max = teacher.amax(1)
        s, t = student - finite_centre(student_max).unsqueeze(1), teacher - finite_centre(teacher_max).unsqueeze(1)
        e_s, e_t = s.exp(), t.exp()
        columns = [
            student_max,
            e_s.sum(1),
            teacher_max,
            e_t.sum(1),
            times_or_zero(e_t, t).sum(1),
            times_or_zero(e_t, t - s).sum(1),
            times_or_zero(e_s, s).sum(1),
            times_or_zero(e_s, s - t).sum(1),
        ]
        return cls(torch.stack(columns, 1))

    def merge(self, other: RowStatistics) -> RowStatistics:
        """The statistics of both parts of each row together. Associative; an empty part (maximum −inf) adds nothing."""
        student_max = torch.maximum(self.student_max, other.student_max)
        teacher_max = torch.maximum(self.teacher_max, other.teacher_max)
        sums = self.recentre(student_max, teacher_max) + other.recentre(student_max, teacher_max)
        return RowStatistics.centred_on(student_max, teacher_max, sums)

    @classmethod
    def centred_on(cls, student_max: Tensor, teacher_max: Tensor, sums: Tensor) -> RowStatistics:
        """The statistics with these maxima ``[n]`` and Z_s, Z_t, A, P, B, Q ``[n, 6]``."""
        student_sum, teacher_sum, *rest = sums.unbind(1)
        return cls(torch.stack([student_max, student_sum, teacher_max, teacher_sum, *rest], 1))

    def recentre(self, student_max: Tensor, teacher_max: Tensor) -> Tensor:
        """The sums Z_s, Z_t, A, P, B, Q after the maxima have moved up to those given, ``[n, 6]``."""
        d_s = distance(self.student_max, student_max)
        d_t = distance(self.teacher_max, teacher_max)
        c_s, c_t = d_s.exp(), d_t.exp()
        _, z_s, _, z_t, a, p, b, q = self.packed.unbind(1)
        return torch.stack(
            [
                c_s * z_s,
                c_t * z_t,
                times_or_zero(c_t, a + z_t * d_t),
                times_or_zero(c_t, p + z_t * (d_t - d_s)),
                times_or_zero(c_s, b + z_s * d_s),
                times_or_zero(c_s, q + z_s * (d_s - d_t)),
            ],
            1,
        )


def finite_centre(maximum: Tensor) -> Tensor:
    """What is subtracted in place of a maximum: −inf − (−inf) would be NaN where −inf is meant."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def times_or_zero(mass: Tensor, value: Tensor) -> Tensor:
    """The product, in which 0 · anything = 0: a column without mass has no share, even of a value of ±inf or NaN."""
    return torch.where(mass == 0, 0.0, mass * value)


def distance(part_max: Tensor, maximum: Tensor) -> Tensor:
    """How far a part's maximum lies below the merged one, ≤ 0; 0 for an empty part, whose sums are 0 anyway."""
    return torch.where(part_max == -torch.inf, 0.0, part_max - maximum)
