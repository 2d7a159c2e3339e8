"""Skewed divergences: a distribution against its mixture with the other (docs/math.md, "Skewed divergences")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import RowStatistics, times_or_zero

FIELDS = ("forward_kl", "reverse_kl", "forward_share", "reverse_share")


class Skews(NamedTuple):
    """The share that each half's own distribution has in its mixture, in [0, 1); 0 is the plain KL."""

    forward: float
    reverse: float


@dataclass(frozen=True, eq=False)
class MixtureStatistics:
    """What a visit of some columns adds to a row's skewed divergences; over the slices of a row they add up.

    With λ and s of :func:`mixture_terms` and d = log p − log q, p the student and q the teacher:

    ================= ==========================================================================
    ``forward_kl``     F = Σ q·λ_f(−d): the KL of the teacher against forward·q + (1 − forward)·p
    ``reverse_kl``     R = Σ p·λ_r(d): the KL of the student against reverse·p + (1 − reverse)·q
    ``forward_share``  U = Σ q·(1 − s_f(−d))
    ``reverse_share``  W = Σ p·s_r(d)
    ================= ==========================================================================

    Args:
        packed: ``[n, 4]`` fp32 or fp64, the four numbers of each row in the order of the table.
    """

    packed: Tensor  # [n, 4]

    @property
    def forward_kl(self) -> Tensor:
        return self.packed[:, 0]

    @property
    def reverse_kl(self) -> Tensor:
        return self.packed[:, 1]

    @property
    def forward_share(self) -> Tensor:
        return self.packed[:, 2]

    @property
    def reverse_share(self) -> Tensor:
        return self.packed[:, 3]

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, statistics: RowStatistics, skews: Skews) -> MixtureStatistics:
        """The sums of the columns given: transformed logits ``[n, k]`` of rows that have ``statistics`` as a whole."""
        p, q, log_ratio = statistics.probabilities(student, teacher)
        forward = mixture_terms(-log_ratio, skews.forward)
        reverse = mixture_terms(log_ratio, skews.reverse)
        terms = [
            times_or_zero(q, forward.log_over_mixture),
            times_or_zero(p, reverse.log_over_mixture),
            times_or_zero(q, forward.other_share),
            times_or_zero(p, reverse.own_share),
        ]
        return cls(torch.stack([term.sum(1) for term in terms], 1))


class MixtureTerms(NamedTuple):
    """A column of one distribution against its mixture with the other, all of one shape."""

    log_over_mixture: Tensor  # λ = log(own mass / mixture)
    own_share: Tensor  # s: one's own share of the mixture
    other_share: Tensor  # 1 − s, without its cancellation


def mixture_terms(x: Tensor, skew: float) -> MixtureTerms:
    """λ(x) = −log(skew + (1 − skew)·e^−x) and the shares, for log-ratios ``x`` of one's own mass to the other.

    Both masses are divided by the larger, so that nothing overflows.
    """
    if skew == 0:
        return MixtureTerms(x, torch.zeros_like(x), torch.ones_like(x))
    smaller = torch.exp(-x.abs())
    own = skew * torch.where(x > 0, 1.0, smaller)
    other = (1 - skew) * torch.where(x > 0, smaller, 1.0)
    mixture = own + other
    return MixtureTerms(x.clamp(max=0) - torch.log(mixture), own / mixture, other / mixture)
