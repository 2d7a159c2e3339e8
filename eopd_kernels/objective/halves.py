"""What may be a half of an Objective besides the full-vocabulary KL: docs/math.md, docs/objectives.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..arguments import finite, one_of, positive_int


@dataclass(frozen=True)
class Sampled:
    """A reverse half: the paper's, a clipped policy gradient on the sampled token y (arXiv 2603.07079, Alg. 1).

    R = max(−A·r, −A·clip(r, 1 − clip_low, 1 + clip_high)) with the ratio r = p(y)/p_old(y) and the advantage
    A = log q(y) − log p_old(y), a constant; ``advantages=`` of the call take its place, and with them no teacher is
    needed for this half. Needs ``token_ids=`` and ``old_log_probs=``. Averaged over y ~ p = p_old its gradient is that
    of the full reverse KL.

    Example::

        objective = Objective(reverse=Sampled(clip_high=0.3), forward="none", gate="never")
        sampled = {"token_ids": torch.tensor([4, 9, 1]), "old_log_probs": torch.full((3,), -4.0)}
        entropy_aware_kl(torch.randn(3, 50), torch.randn(3, 50), objective=objective, **sampled)

    Args:
        clip_low: ε_low in [0, 1]. Default 0.2, as in PPO.
        clip_high: ε_high ≥ 0. Default 0.2.
        clip_most: the dual clip, above 1: where A < 0, R is at most −A·clip_most, however large r is, and has no
            gradient beyond. Default None: no such bound. RL trainers take 3.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_most: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_low", finite("Sampled.clip_low", self.clip_low, least=0.0, most=1.0))
        object.__setattr__(self, "clip_high", finite("Sampled.clip_high", self.clip_high, least=0.0))
        if self.clip_most is not None:
            object.__setattr__(self, "clip_most", finite("Sampled.clip_most", self.clip_most, above=1.0))

    def formula(self) -> str:
        """R as a formula, for people."""
        clip = f"max(−A·r, −A·clip(r, {1 - self.clip_low:g}, {1 + self.clip_high:g}))"
        if self.clip_most is not None:
            clip += f", at most −{self.clip_most:g}·A where A < 0"
        return f"{clip}, r = p(y)/p_old(y), A = log q(y) − log p_old(y) or as it is given"


@dataclass(frozen=True)
class TopK:
    """Either half, over a set S of k entries: those that the teacher, or the student, finds likeliest.

    Forward: F = Σ_S q̃·(log q̃ − log p) (arXiv 2603.07079, Eq. 10). With the teacher renormalised over S and the student
    not, F keeps pushing the student's mass into S even where p = q: the teacher is no fixed point unless S holds all of
    its mass. ``tail=True`` has no such bias. Reverse: R = Σ_S p·(log p − log q), which a :class:`TopKTeacher` has too;
    raw without a tail it pushes the student's mass out of S. docs/guides/top_k.md shows all of them.

    Args:
        k: the size of S, at most V. Default 16, the paper's. Entries that have no mass are in no S. With a
            :class:`TopKTeacher` S is what the teacher served, and k is not used.
        teacher: ``"renormalized"`` (default, the paper's): q̃ = q / Σ_S q; ``"raw"``: q̃ = q.
        student: ``"full"`` (default, the paper's): log p over the whole vocabulary; ``"renormalized"``: over S.
        tail: one more class for what is outside S, of masses 1 − Σ_S q and 1 − Σ_S p. Needs a raw teacher and a full
            student. Either half is then the KL of two coarser distributions, never negative, and 0 where p = q.
        of: whose likeliest entries S holds: ``"teacher"`` (default) or ``"student"``. S is a constant of the gradient.

    A reverse half is raw, with or without a tail, or renormalised on both sides: a teacher that is renormalised beside
    a student that is not would be below 0 where they are equal.

    Example::

        same, other = torch.randn(2, 3, 50)
        tailed = TopK(8, teacher="raw", tail=True)
        assert entropy_aware_kl(same, same, objective=Objective(forward=tailed)).loss.abs() < 1e-6
        reverse = Objective(reverse=TopK(8, teacher="raw", tail=True, of="student"), forward="none", gate="never")
        assert entropy_aware_kl(same, other, objective=reverse).loss > 0
    """

    k: int = 16
    teacher: Literal["renormalized", "raw"] = "renormalized"
    student: Literal["full", "renormalized"] = "full"
    tail: bool = False
    of: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        positive_int("TopK.k", self.k)
        one_of("TopK.teacher", self.teacher, ("renormalized", "raw"))
        one_of("TopK.student", self.student, ("full", "renormalized"))
        one_of("TopK.tail", self.tail, (False, True))
        one_of("TopK.of", self.of, ("teacher", "student"))
        if self.tail and (self.teacher, self.student) != ("raw", "full"):
            raise ValueError(
                "TopK.tail holds the mass outside the top k, so it needs teacher='raw' and student='full', "
                f"got teacher={self.teacher!r} and student={self.student!r}"
            )

    def formula(self, own: str, other: str) -> str:
        """The half whose expectation is taken under ``own``, "q" or "p", as a formula, for people."""
        shown = {"q": "q" if self.teacher == "raw" else "q̃", "p": "p" if self.student == "full" else "p̃"}
        tail = f" + (1 − {own}(S))·log((1 − {own}(S))/(1 − {other}(S)))" if self.tail else ""
        text = f"Σ_S {shown[own]}·log({shown[own]}/{shown[other]}){tail}, S = the {self.of}'s {self.k} likeliest"
        return text + "".join(f", {x}̃ = {x}/{x}(S)" for x in (own, other) if shown[x] != x)


@dataclass(frozen=True)
class Skewed:
    """Either half, against a mixture with its own distribution (DistiLLM, arXiv 2402.03898).

    Forward: F = KL(q ‖ skew·q + (1 − skew)·p). Reverse: R = KL(p ‖ skew·p + (1 − skew)·q). Finite even where the other
    side has no mass.

    Args:
        skew: in [0, 1); 0 is the plain KL. Default 0.1, DistiLLM's.

    Example::

        objective = Objective(reverse=Skewed(0.1), forward="none")
        teacher = torch.tensor([[0.0, -torch.inf]])  # without mass where the student has some
        assert entropy_aware_kl(torch.zeros(1, 2), teacher, objective=objective).loss.isfinite()
    """

    skew: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "skew", finite("Skewed.skew", self.skew, least=0.0))
        if self.skew >= 1:
            raise ValueError(f"Skewed.skew must be below 1, where the divergence is 0 everywhere, got {self.skew!r}")

    def formula(self, own: str, other: str) -> str:
        """The KL of ``own`` against the mixture, for people."""
        return f"KL({own} ‖ {self.skew:g}·{own} + {1 - self.skew:g}·{other})"
