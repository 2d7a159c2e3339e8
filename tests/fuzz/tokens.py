"""What a random call says of each token: which count and how much, sampled tokens, given gates, a served teacher."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eopd_kernels import Objective, Sampled, TopKTeacher
from tests.fuzz.layouts import FLOATING, INTEGERS, SIGNED, Drawn, Layout, layout

if TYPE_CHECKING:
    from tests.fuzz.truth import Distributions


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """The arguments ``[...]`` that concern tokens, as they are passed and as what they mean.

    Args:
        weights: ``[N]`` fp64, what each token counts for.
        mask, labels: as they are passed.
        ignore_index: of the labels.
        num_items: as it is passed, or None.
        given: token_ids, old_log_probs, gate, reverse_weights, forward_weights: those that are passed.
        served: ids, log_probs, entropy, valid, token_log_probs of a served teacher; without ids it is no such teacher.
        entries: ``[N, k]`` its ids and log-probabilities without what repeats or is missing, the latter −inf, fp64.
    """

    weights: Tensor
    mask: Drawn | None
    labels: Drawn | None
    ignore_index: int
    num_items: int | float | Tensor | None
    given: dict[str, Drawn]
    served: dict[str, Drawn] = field(default_factory=dict)
    entries: tuple[Tensor, Tensor] | None = None

    @property
    def valid(self) -> Tensor:
        """``[N]`` which tokens count."""
        return self.weights != 0

    @property
    def denominator(self) -> float:
        """What ``reduction="mean"`` divides by."""
        count = float(self.valid.sum()) if self.num_items is None else float(self.num_items)
        return count or 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        """As the loss takes them, but for a served teacher."""
        named: dict[str, Any] = {name: drawn.tensor for name, drawn in self.given.items()}
        if self.mask is not None:
            named["mask"] = self.mask.tensor
        if self.labels is not None:
            named |= {"labels": self.labels.tensor, "ignore_index": self.ignore_index}
        return named | ({} if self.num_items is None else {"num_items": self.num_items})

    @property
    def teacher(self) -> TopKTeacher:
        return TopKTeacher(**{name: drawn.tensor for name, drawn in self.served.items()})

    def of(self, drawn: Drawn, dtype: torch.dtype) -> Tensor:
        """A per-token argument with 0 where the token does not count."""
        tensor = drawn.tensor.to(dtype)
        return torch.where(self.valid.view(tensor.shape), tensor, torch.zeros((), dtype=dtype))

    def clean(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``given`` in ``dtype``."""
        return {n: self.of(d, torch.int64 if n == "token_ids" else dtype) for n, d in self.given.items()}

    def clean_teacher(self, dtype: torch.dtype) -> TopKTeacher:
        """The served teacher in ``dtype``."""
        assert self.entries is not None
        ids, log_probs = (e.view(self.served["ids"].layout.shape[:-1] + e.shape[-1:]) for e in self.entries)
        of_token = {n: self.of(self.served[n], dtype) for n in ("entropy", "token_log_probs") if n in self.served}
        of_token.setdefault("entropy", entropy_with_a_rest(log_probs.to(dtype)))
        return TopKTeacher(ids, log_probs.to(dtype), **of_token)

    def entropies(self, p_and_q: Distributions, of: str) -> Tensor:
        """``[N]`` fp64, of the teacher as far as it is known."""
        if of == "teacher" and self.entries is not None:
            if "entropy" in self.served:
                return self.of(self.served["entropy"], torch.float64).reshape(-1)
            return entropy_with_a_rest(self.entries[1])
        log_mass = p_and_q.log_p if of == "student" else p_and_q.log_q
        assert log_mass is not None
        return -torch.xlogy(log_mass.exp(), log_mass.exp()).sum(1)

    def __str__(self) -> str:
        named: dict[str, Any] = {**self.given, "mask": self.mask, "labels": self.labels, "num_items": self.num_items}
        named["ignore_index"] = None if self.labels is None else self.ignore_index
        named |= {f"teacher.{name}": drawn for name, drawn in self.served.items()}
        return "".join(f"{name}={value}, " for name, value in named.items() if value is not None)


def entropy_with_a_rest(log_probs: Tensor) -> Tensor:
    """Of the entries ``[..., k]`` and one class for everything else."""
    q = log_probs.exp()
    rest = (1 - q.sum(-1)).clamp_min(0)
    return -torch.xlogy(q, q).sum(-1) - torch.xlogy(rest, rest)


def draw_tokens(
    choose: random.Random,
    numbers: torch.Generator,
    p_and_q: Distributions,
    leading: tuple[int, ...],
    objective: Objective,
    served: bool,
    margin: float,
) -> TokenInputs:
    """Everything that the objective needs, and some of what it may be given."""
    mask, labels, ignore_index = draw_mask(choose, numbers, leading), None, -100
    weights = torch.ones(leading, dtype=torch.float64) if mask is None else mask.tensor.double()
    if choose.random() < 0.3:
        labels, ignore_index = draw_labels(choose, numbers, leading)
        weights = torch.where(labels.tensor.long() == ignore_index, 0.0, weights)
    weights = weights.reshape(-1).clone()
    valid = (weights != 0).view(leading)

    def argument(values: Tensor, dtype: torch.dtype, unused: Any = None, **how_to: Any) -> Drawn:
        """In any layout; ``unused``, or NaN, where the token does not count."""
        how = layout(choose, leading, **how_to)
        unused = torch.nan if unused is None and dtype.is_floating_point else unused
        if unused is not None and how.content == leading:
            values = torch.where(valid, values, unused)
        return Drawn.of(how, values.to(dtype))

    given: dict[str, Drawn] = {}
    for name in ("gate", "reverse_weights", "forward_weights"):
        if choose.random() < 0.15:
            values = (torch.rand(leading, generator=numbers) - 0.2).clamp(0, 0.7)
            dtype = choose.choice((*FLOATING, torch.bool, torch.int64, torch.uint8))
            given[name] = argument(values if dtype.is_floating_point else values > 0.3, dtype)
    entries = None
    of_server: dict[str, Drawn] = {}
    vocab_size = p_and_q.log_p.shape[1]
    fitting = [d for d in INTEGERS if torch.iinfo(d).max >= vocab_size - 1]
    if isinstance(objective.reverse, Sampled):
        ids = torch.randint(vocab_size, leading, generator=numbers)
        dtype = choose.choice(fitting)
        given["token_ids"] = argument(ids, dtype, -100 if dtype in SIGNED else 255)
        ids = torch.where(valid, given["token_ids"].tensor.long(), 0)
        old = behaviour(
            choose, numbers, p_and_q.log_p.gather(1, ids.reshape(-1, 1)).view(leading), objective.reverse, margin
        )
        given["old_log_probs"] = argument(old, old.dtype, dense_rows=True)
    if served:
        entries, of_server = draw_teacher(choose, numbers, leading, vocab_size, valid, fitting)
        if isinstance(objective.reverse, Sampled):
            of_server["token_log_probs"] = argument(
                -3 * torch.rand(leading, generator=numbers), choose.choice(FLOATING)
            )
        if choose.random() < 0.5:
            of_server["entropy"] = argument(4 * torch.rand(leading, generator=numbers), choose.choice(FLOATING))

    def spoilt(laid: Layout, values: Tensor, unused: float) -> Drawn:
        """What is unused at tokens that do not count, where each has memory of its own."""
        return Drawn.of(laid, values if laid.content != laid.shape else torch.where(valid, values, unused))

    apart = random.Random(numbers.initial_seed())  # so that whatever else is drawn stays what it was
    if "token_ids" not in given and (apart.random() < 0.3 or objective.cross_entropy != 0):
        ids = torch.randint(vocab_size, leading, generator=torch.Generator().manual_seed(numbers.initial_seed() + 1))
        given["token_ids"] = spoilt(layout(apart, leading), ids, -100)
    if isinstance(objective.reverse, Sampled) and apart.random() < 0.4:
        values = 2 * torch.randn(leading, generator=torch.Generator().manual_seed(numbers.initial_seed() + 2))
        given["advantages"] = spoilt(layout(apart, leading), values, torch.nan)
    number = choose.choice((0, 1, 7, 12.5, 250, 0.5))
    kinds = [
        lambda: number,
        lambda: torch.tensor(number),
        lambda: torch.tensor([number]).double(),
        lambda: torch.tensor(7, dtype=torch.int32),
    ]
    num_items: Any = choose.choice(kinds)() if choose.random() < 0.3 else None
    return TokenInputs(weights, mask, labels, ignore_index, num_items, given, of_server, entries)


def draw_mask(choose: random.Random, numbers: torch.Generator, leading: tuple[int, ...]) -> Drawn | None:
    """Bools, counts or weights; of every dtype and layout."""
    if choose.random() < 0.4:
        return None
    dtype = choose.choice((torch.bool, torch.bool, *INTEGERS, *FLOATING, *3 * (torch.float32,)))
    if dtype == torch.bool:
        values = torch.rand(leading, generator=numbers) > 0.4
    elif dtype.is_floating_point:
        values = (3 * torch.rand(leading, generator=numbers) - 1).clamp_min(0)
    else:
        values = torch.randint(0, 3, leading, generator=numbers)
    return Drawn.of(layout(choose, leading), values.to(dtype))


def draw_labels(choose: random.Random, numbers: torch.Generator, leading: tuple[int, ...]) -> tuple[Drawn, int]:
    """Labels of any integer dtype, and what marks those to leave out, which the dtype may not even hold."""
    dtype = choose.choice(INTEGERS)
    limits = torch.iinfo(dtype)
    ignore_index = choose.choice((-100, 0, 7, 255))
    values = torch.randint(max(limits.min, -200), min(limits.max, 300) + 1, leading, generator=numbers)
    if limits.min <= ignore_index <= limits.max:
        values = torch.where(torch.rand(leading, generator=numbers) < 0.3, ignore_index, values)
    return Drawn.of(layout(choose, leading), values.to(dtype)), ignore_index


def behaviour(choose: random.Random, numbers: torch.Generator, log_p: Tensor, half: Sampled, margin: float) -> Tensor:
    """log p_old of the sampled tokens, such that no ratio lies at the edge of the clip."""
    dtype = choose.choice(FLOATING)
    edges = torch.tensor([1 - half.clip_low, 1 + half.clip_high, half.clip_most or 0.0], dtype=torch.float64)
    old = log_p.to(torch.float64)
    for _ in range(20):
        drawn = (log_p - 0.6 * torch.randn(log_p.shape, generator=numbers)).clamp(max=0).to(dtype).double()
        near = ((log_p - drawn).exp().unsqueeze(-1) - edges).abs().amin(-1) < 5 * margin
        old = torch.where(near, old, drawn)
    return old.to(dtype if bool((old == old.to(dtype)).all()) else torch.float64)


def draw_teacher(
    choose: random.Random,
    numbers: torch.Generator,
    leading: tuple[int, ...],
    vocab_size: int,
    valid: Tensor,
    fitting: list[torch.dtype],
) -> tuple[tuple[Tensor, Tensor], dict[str, Drawn]]:
    """A served teacher: what its entries are, and how they are handed out, in any order, some missing or repeated."""
    k, n = choose.randint(1, min(vocab_size, 20)), valid.numel()
    log_q = torch.log_softmax(3 * torch.randn(n, vocab_size, generator=numbers), 1)
    dtype = choose.choice((*FLOATING[:1], *FLOATING))
    ids = torch.rand(n, vocab_size, generator=numbers).argsort(1)[:, :k]
    log_probs = log_q.gather(1, ids).to(dtype)
    missing = torch.rand(n, k, generator=numbers) < choose.choice((0.0, 0.2, 0.6))
    entries = ids, torch.where(missing, -torch.inf, log_probs).double()
    if choose.random() < 0.3:  # the whole list once more: what is there counts once
        ids, log_probs, missing = (torch.cat([t, t], 1) for t in (ids, log_probs, missing))
    id_dtype = choose.choice(fitting)
    ways = ["valid", "-inf"] + (["-1"] if id_dtype in SIGNED else [])
    way = choose.choice(ways)
    named: dict[str, tuple[Tensor, torch.dtype]] = {}
    if way == "valid":
        named["valid"] = ~missing, torch.bool
    elif way == "-inf":
        log_probs = log_probs.masked_fill(missing, -torch.inf)
    else:
        ids = ids.masked_fill(missing, -1)
    named |= {"ids": (ids, id_dtype), "log_probs": (log_probs, dtype)}
    shape = (*leading, ids.shape[1])
    plain = {
        name: Drawn.of(layout(choose, shape, dense_rows=True), values.reshape(shape).to(kind))
        for name, (values, kind) in named.items()
    }
    return entries, plain
