"""Gates: from the numbers of the rows to how far each token's gate is open. No kernel is known here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..arguments import finite, one_of
from ..row_math.formulas import exceeds
from ..row_math.statistics import RowStatistics

SIDES = ("teacher", "student")


@dataclass(frozen=True)
class EntropyGate:
    """g = 1[H > threshold], the hard gate of arXiv 2603.07079, Eq. 9, or a soft one: g = sigmoid(sharpness·(H − τ)).

    Args:
        threshold: τ, finite: in nats, or in [0, 1] with ``normalized``. Default 0.8, the paper's.
        of: whose entropy H is: ``"teacher"`` (default, the paper's) or ``"student"``. It is a constant either way: no
            gradient flows through a gate.
        normalized: compare H / log V, which is 1 for a uniform distribution, instead of H. Default False.
        sharpness: None (default) for the hard gate, else > 0, per nat (per unit of H / log V with ``normalized``).

    Raises:
        TypeError, ValueError: an option is outside what is stated above.

    Example::

        sharp, flat = 9.0 * torch.eye(50)[:2], torch.zeros(1, 50)
        teacher = torch.cat([sharp, flat])
        out = entropy_aware_kl(torch.zeros(3, 50), teacher, objective=Objective(gate=EntropyGate(0.8)))
        assert out.gate.tolist() == [0.0, 0.0, 1.0]
    """

    threshold: float = 0.8
    of: Literal["teacher", "student"] = "teacher"
    normalized: bool = False
    sharpness: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", finite("EntropyGate.threshold", self.threshold))
        one_of("EntropyGate.of", self.of, SIDES)
        one_of("EntropyGate.normalized", self.normalized, (False, True))
        if self.sharpness is not None:
            object.__setattr__(self, "sharpness", finite("EntropyGate.sharpness", self.sharpness, above=0.0))

    def threshold_in_nats(self, vocab_size: int) -> float:
        """Returns τ in nats, for entropies over ``vocab_size`` entries."""
        return self.threshold * math.log(vocab_size) if self.normalized else self.threshold

    def __call__(self, statistics: RowStatistics, vocab_size: int) -> Tensor:
        """Returns how far each row's gate is open, ``[n]`` in [0, 1]; NaN where the entropy is."""
        h, threshold = entropy(statistics, self.of), self.threshold_in_nats(vocab_size)
        if self.sharpness is None:
            return exceeds(h, threshold)
        per_nat = self.sharpness / (max(math.log(vocab_size), 1e-9) if self.normalized else 1.0)
        return torch.sigmoid(per_nat * (h - threshold))

    def __str__(self) -> str:
        name = f"H_{self.of}" + (" / log V" if self.normalized else "")
        if self.sharpness is None:
            return f"1[{name} > {self.threshold:g}]"
        return f"sigmoid({self.sharpness:g}·({name} − {self.threshold:g}))"


@dataclass(frozen=True)
class QuantileGate:
    """g = 1[H > the quantile of H over the batch's valid tokens]: a share of the tokens, whatever their entropies are.

    The threshold needs every token's entropy before the first gradient, so that this gate takes the schedule
    ``"recompute"``. It is that of one call: of a micro-batch, not of a global batch.

    Args:
        quantile: the share of valid tokens whose gate stays shut, in [0, 1]. Default 0.8: the fifth with the highest
            entropy is open (the share of arXiv 2506.01939, whose entropy is the student's).
        of: ``"teacher"`` (default) or ``"student"``.

    Raises:
        TypeError, ValueError: an option is outside what is stated above.

    Example::

        objective = Objective(gate=QuantileGate(0.75))
        out = entropy_aware_kl(torch.randn(8, 50), torch.randn(8, 50), objective=objective)
        assert out.gate.sum() == 2
    """

    quantile: float = 0.8
    of: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantile", finite("QuantileGate.quantile", self.quantile, least=0.0, most=1.0))
        one_of("QuantileGate.of", self.of, SIDES)

    def __call__(self, statistics: RowStatistics, vocab_size: int) -> Tensor:
        """Returns 1 where a row's gate is open, ``[N]``; rows whose entropy is NaN have gate NaN and do not count."""
        h = entropy(statistics, self.of)
        if len(h) == 0:
            return h
        return exceeds(h, nanquantile(h, self.quantile))

    def __str__(self) -> str:
        return f"1[H_{self.of} > its {self.quantile:g}-quantile in the batch]"


# A user's own: from the statistics of all N tokens of a call to [N] numbers. Tokens that are left out have NaN there.
CustomGate = Callable[[RowStatistics], Tensor]
Gate = EntropyGate | QuantileGate | Literal["always", "never"] | CustomGate


def entropy(statistics: RowStatistics, of: str) -> Tensor:
    """Returns the entropy of one side in nats, ``[n]``."""
    return statistics.teacher_entropy if of == "teacher" else statistics.student_entropy


def nanquantile(values: Tensor, share: float) -> Tensor:
    """Returns ``values.nanquantile(share)`` of one or more values in one dimension.

    That of torch 2.11 waits for a GPU and takes 16 million values at most.
    """
    ascending = values.sort().values  # NaN last
    rank = share * ((~values.isnan()).sum(dtype=values.dtype) - 1).clamp(min=0)
    below, above = (ascending.gather(0, r.long().view(1)) for r in (rank.floor(), rank.ceil()))
    return below.lerp(above, rank - rank.floor())


def gate_values(gate: Gate, statistics: RowStatistics, vocab_size: int, weights: Tensor) -> Tensor:
    """Returns how far the gate of each row is open, ``[n]`` in the compute dtype; 0 where the weight is 0.

    It has no gradient.

    Raises:
        TypeError, ValueError: a callable gate returned something else than one number per row.
    """
    dtype, n = statistics.packed.dtype, len(weights)
    if isinstance(gate, str):
        opened = torch.full_like(weights, 1.0 if gate == "always" else 0.0)
    elif isinstance(gate, EntropyGate):
        opened = gate(statistics, vocab_size)
    else:
        valid = statistics.unknown_where(weights == 0)
        if isinstance(gate, QuantileGate):
            opened = gate(valid, vocab_size)
        else:
            opened = gate(valid)
            if not isinstance(opened, Tensor) or opened.is_complex():
                raise TypeError(f"a callable gate must return a tensor of real numbers, got {type(opened).__name__}")
            if tuple(opened.shape) != (n,):
                raise ValueError(f"a callable gate must return one number per row, [{n}], got {list(opened.shape)}")
    return torch.where(weights == 0, 0.0, opened.detach().to(dtype))


def needs_every_row(gate: Gate) -> bool:
    """Returns whether a row's gate may depend on other rows, so that all statistics come before the first gradient."""
    return not isinstance(gate, str | EntropyGate)


def needs_student(gate: Gate) -> bool:
    """Returns whether the gate may look at the student."""
    return not isinstance(gate, str) and getattr(gate, "of", "student") == "student"
