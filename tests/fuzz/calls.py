"""One random call of the loss: both sides, the objective, what is said of each token, and how it is to be run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from eopd_kernels import EntropyGate, LMHead, Objective, QuantileGate, RowStatistics, Sampled, Skewed, TopK
from tests.conftest import logits_like
from tests.fuzz.layouts import FLOATING, Drawn, Layout, layout
from tests.fuzz.tokens import TokenInputs, draw_tokens
from tests.fuzz.truth import Distributions, distributions

LEADING: list[tuple[int, ...]] = [(), (1,), (5,), (40,), (1, 9), (9, 1), (3, 4), (2, 3, 2), (1, 1, 1), (0,), (3, 0)]
VOCABULARIES = [1, 2, 5, 17, 64, 130, 1025, 1025]
COMBINES: tuple[Literal["add", "switch", "blend"], ...] = ("add", "switch", "blend")
SKEWS = (0.0, 0.1, 0.5, 0.9)
REVERSE_TOPS = [("raw", "full", False), ("raw", "full", True), ("raw", "renormalized", False)]
REVERSE_TOPS += [("renormalized", "renormalized", False)]
FORWARD_TOPS = [*REVERSE_TOPS, ("renormalized", "full", False)]
MARGIN = 1e-3  # between an entropy and a threshold, and around the edge of a clip, where fp32 and fp64 may part


@dataclass(frozen=True, eq=False)
class Side:
    """Logits, or hidden states with a head."""

    rows: Drawn  # [..., V] or [..., D]
    weight: Drawn | None = None  # [V, D]
    bias: Drawn | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def drawn(self) -> list[Drawn]:
        """Its tensors, those that there are."""
        return [d for d in (self.rows, self.weight, self.bias) if d is not None]

    @property
    def width(self) -> int:
        """V."""
        return self.rows.layout.shape[-1] if self.weight is None else self.weight.layout.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That it is computed in: fp64 if any of its tensors is."""
        wide = any(d.memory.dtype == torch.float64 for d in self.drawn)
        return torch.float64 if wide else torch.float32

    def of(self, tensors: list[Tensor]) -> tuple[Tensor, LMHead | None]:
        """Its tensors, in the order of ``drawn``, as arguments of the loss."""
        if self.weight is None:
            return tensors[0], None
        bias = tensors[2] if self.bias is not None else None
        return tensors[0], LMHead(tensors[1], bias, scale=self.scale, softcap=self.softcap)

    def __str__(self) -> str:
        kinds = ("rows", "weight", "bias")[: len(self.drawn)] if self.weight is not None else ("logits",)
        parts = [f"{kind} {drawn}" for kind, drawn in zip(kinds, self.drawn, strict=True)]
        parts += [f"scale {self.scale}"] if self.scale != 1 else []
        parts += [f"softcap {self.softcap}"] if self.softcap is not None else []
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class Call:
    """Everything of one call.

    Args:
        options: reduction, schedule, backend, workspace_bytes, inplace, vocab_size.
        grads: which of the student's tensors require a gradient.
        upstream: "plain", or how the upstream gradient of ``reduction="none"`` lies: "expanded" or "transposed".
    """

    seed: int
    student: Side
    teacher: Side | None  # None: tokens.sparse
    vocab_size: int
    objective: Objective
    tokens: TokenInputs
    options: dict[str, Any]
    grads: tuple[bool, ...]
    upstream: str

    @property
    def leading(self) -> tuple[int, ...]:
        return self.student.rows.layout.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        return torch.float64 if any(side.dtype == torch.float64 for side in sides) else torch.float32

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype with the largest roundings: hidden states are projected in their own, upcast to fp32 at least."""
        projected = [s.dtype for s in (self.student, self.teacher) if s is not None and s.weight is not None]
        return torch.float32 if torch.float32 in projected else self.dtype

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        teacher = "" if self.teacher is None else f"teacher={self.teacher}, "
        return (
            f"seed {self.seed}: entropy_aware_kl(student={self.student}, {teacher}{self.tokens}objective="
            f"{self.objective!r}, {options}); gradients of {self.grads}, upstream {self.upstream}"
        )


def leading_gate(statistics: RowStatistics) -> Tensor:
    """A user's own gate: open where the student is less sure than the teacher."""
    return torch.sigmoid(statistics.student_entropy - statistics.teacher_entropy)


def draw(seed: int) -> Call:
    """The call of a seed, always the same."""
    choose = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    leading, vocab_size = choose.choice(LEADING), choose.choice(VOCABULARIES)
    served = choose.random() < 0.15
    halves = draw_halves(choose, served)
    inplace = choose.random() < 0.1
    wide = choose.random() < 0.15  # some tensor is fp64
    shared = logits_like(numbers, *leading, vocab_size)
    inplace = inplace and shared.numel() > 0
    logits = {"student": inplace or choose.random() < 0.5, "teacher": choose.random() < 0.5}
    suppressed = all(logits.values()) and not served and halves[0] != "sampled" and vocab_size > 4
    suppressed = suppressed and choose.random() < 0.15
    if suppressed:
        half = vocab_size // 2  # and a whole slice of the vocabulary, where there are several
        shared[..., slice(*choose.choice(((3, 5), (0, half), (half, vocab_size))))] = -torch.inf
    padded = choose.random() < 0.25

    def side(name: str) -> Side:
        width = vocab_size + (choose.choice((0, 1, 7)) if padded else 0)
        kinds: Sequence[torch.dtype] = FLOATING if wide else FLOATING[:3]
        if not logits[name]:
            return draw_hidden_side(choose, numbers, shared.shape, width, kinds)
        # Among logits of 16 bits the k-th likeliest is seldom one.
        untied = "top" in halves
        kinds = tuple(d for d in kinds if d.itemsize >= 4) if untied else kinds
        dense_rows = inplace and name == "student"
        how = layout(choose, (*leading, width), dense_rows=dense_rows, keep_last=untied or suppressed)
        return draw_logits_side(choose, numbers, shared, how, kinds)

    student = side("student")
    teacher = None if served else side("teacher")
    p_and_q = distributions(student, teacher, vocab_size)
    objective, p_and_q = draw_objective(choose, halves, p_and_q, served)
    if suppressed or vocab_size == 1:  # −log 0, which is finite where −inf is replaced; −log 1, within a rounding of z
        objective = replace(objective, cross_entropy=0.0)
    tokens = draw_tokens(choose, numbers, p_and_q, leading, objective, served, MARGIN)
    if suppressed:
        tokens = replace(tokens, given={name: drawn for name, drawn in tokens.given.items() if name != "token_ids"})
    objective = decided(choose, objective, p_and_q, tokens, vocab_size)
    if choose.random() < 0.3:
        for unread in (student, teacher):
            spoil(unread, tokens.valid)
    reduction = choose.choice(("mean", "sum", "none"))
    if reduction != "mean":
        tokens = replace(tokens, num_items=None)
    whole = reduction == "none" or (not isinstance(objective.gate, str | EntropyGate) and "gate" not in tokens.given)
    schedules = ["auto", "recompute"] if whole else ["auto", "chunked", "recompute"]
    options: dict[str, Any] = {
        "reduction": reduction,
        "schedule": choose.choice(schedules),
        "backend": choose.choice(("auto", "cpu", "torch")),
        "workspace_bytes": choose.choice((None, 1, 2**12, 2**18)),
    }
    widths = {s.width for s in (student, teacher) if s is not None}
    if widths != {vocab_size} or choose.random() < 0.2:
        options["vocab_size"] = vocab_size
    if inplace and not whole:
        options |= {"inplace": True, "schedule": choose.choice(("auto", "chunked"))}
    grads = tuple(choose.random() < 0.7 for _ in student.drawn)
    if not any(grads) or options.get("inplace"):
        grads = (True, *grads[1:])
    upstream = choose.choice(("plain", "expanded", "transposed"))
    return Call(seed, student, teacher, vocab_size, objective, tokens, options, grads, upstream)


def draw_halves(choose: random.Random, served: bool) -> tuple[str, str]:
    """The kinds of the reverse and of the forward half."""
    dense = [] if served else ["full", "full", "skewed"]
    reverses, forwards = [*dense, "sampled", "top", "none"], [*dense, "top", "top", "none"]
    pairs = [(r, f) for r in reverses for f in forwards if (r, f) != ("none", "none")]
    return choose.choice(pairs)


def draw_logits_side(
    choose: random.Random, numbers: torch.Generator, shared: Tensor, how: Layout, kinds: Sequence[torch.dtype]
) -> Side:
    """Logits near the shared ones ``[..., V]``; what lies beyond the compared entries would dominate."""
    logits = torch.full(how.shape, 50.0)
    noise = choose.choice((0.01, 1.0, 3.0)) * torch.randn(shared.shape, generator=numbers)
    logits[..., : shared.shape[-1]] = shared + noise
    return Side(Drawn.of(how, logits.to(choose.choice(kinds))))


def draw_hidden_side(
    choose: random.Random, numbers: torch.Generator, shape: torch.Size, width: int, kinds: Sequence[torch.dtype]
) -> Side:
    """Hidden states and a head of ``width`` entries, of which those beyond the compared ones would dominate."""
    dim = choose.choice((1, 3, 24))
    hidden = logits_like(numbers, *shape[:-1], dim, spread=2.0)
    weight = torch.randn(width, dim, generator=numbers) * choose.choice((0.3, 1.0)) / dim**0.5
    weight[shape[-1] :] = 50.0
    dtype = choose.choice(kinds)
    drawn = [
        Drawn.of(layout(choose, t.shape), t.to(choose.choice(kinds) if choose.random() < 0.3 else dtype))
        for t in (hidden, weight, torch.randn(width, generator=numbers))
    ]
    bias = drawn[2] if choose.random() < 0.4 else None
    scale, softcap = choose.choice((1.0, 1.0, 0.5, -1.4)), choose.choice((None, None, 5.0, 30.0))
    return Side(drawn[0], drawn[1], bias, scale, softcap)


def spoil(side: Side | None, valid: Tensor) -> None:
    """NaN in the rows of tokens that do not count, where they have memory of their own."""
    if side is None or side.rows.layout.content != side.rows.layout.shape:
        return
    rows = side.rows.tensor  # a view of the memory
    rows.masked_fill_(~valid.view(rows.shape[:-1]).unsqueeze(-1), torch.nan)


def draw_objective(
    choose: random.Random, halves: tuple[str, str], p_and_q: Distributions, served: bool
) -> tuple[Objective, Distributions]:
    """The objective but for its gate's threshold, and the distributions at its temperatures."""
    temperature: Any = choose.choice((1.0, 1.0, 0.7, 2.0, (2.0, 1.3)))
    if served:
        temperature = (choose.choice((0.7, 2.0)), 1.0) if choose.random() < 0.5 else 1.0
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    p_and_q = p_and_q.at(*pair)
    reverse: Any = halves[0]
    if reverse == "sampled":
        reverse = Sampled(*choose.choice(((0.2, 0.2, None), (0.1, 0.4, 1.8))))
    elif reverse == "skewed":
        reverse = Skewed(choose.choice(SKEWS))
    elif reverse == "top":
        reverse = draw_top_k(choose, p_and_q, served, REVERSE_TOPS)
    forward: Any = halves[1]
    if forward == "skewed":
        forward = Skewed(choose.choice(SKEWS))
    elif forward == "top":
        forward = draw_top_k(choose, p_and_q, served, FORWARD_TOPS)
    objective = Objective(
        gate=draw_gate(choose, served),
        alpha=choose.choice((1.0, 0.7, 0.7, 0.0)),
        combine=choose.choice(COMBINES),
        temperature=temperature,
        reverse=reverse,
        forward=forward,
        reverse_weight=choose.choice((1.0, 1.5, 0.0)),
        temperature_squared=not isinstance(temperature, tuple) and choose.random() < 0.3,
        cross_entropy=0.4 if pair[0] == 1 and choose.random() < 0.3 else 0.0,
    )
    return objective, p_and_q


def draw_top_k(
    choose: random.Random, p_and_q: Distributions, served: bool, variants: Sequence[tuple[str, str, bool]]
) -> TopK:
    """A top k whose last entry is the same in fp32 and fp64; where there is none, the whole vocabulary."""
    teacher, student, tail = choose.choice(variants)
    of, k = "teacher", 16
    if not served:
        of = choose.choice(("teacher", "student"))
        ranked = p_and_q.log_p if of == "student" else p_and_q.log_q
        assert ranked is not None and p_and_q.log_q is not None
        ordered = ranked.sort(1, descending=True).values
        gaps = (ordered[:, :-1] - ordered[:, 1:]).amin(0) if len(ordered) else ordered.new_ones(ordered.shape[1] - 1)
        apart = [*(int(i) + 1 for i in (gaps > MARGIN / 10).nonzero()), ordered.shape[1]]
        k = choose.choice([i for i in apart if i < 4] or apart) if choose.random() < 0.5 else choose.choice(apart)
        # What is left outside of S is a difference from 1, and a half divides by that of the other side.
        divisor = p_and_q.log_p if variants is FORWARD_TOPS else p_and_q.log_q
        outside = 1 - divisor.gather(1, ranked.topk(k, 1).indices).exp().sum(1)
        tail = tail and bool((outside.nan_to_num(1.0) > 1e-2).all())
    return TopK(k, teacher=teacher, student=student, tail=tail, of=of)  # type: ignore[arg-type]


def draw_gate(choose: random.Random, served: bool) -> Any:
    """A gate; of hard thresholds the threshold is still to be decided."""
    of = choose.choice(("teacher", "student"))
    gates: list[Any] = ["always", "never", EntropyGate(of=of), EntropyGate(of=of), QuantileGate(of=of)]  # type: ignore[arg-type]
    gates += [EntropyGate(2.0, of=of, sharpness=1.5), EntropyGate(0.4, of=of, normalized=True, sharpness=3.0)]  # type: ignore[arg-type]
    return choose.choice(gates if served else [*gates, leading_gate])


def decided(
    choose: random.Random, objective: Objective, p_and_q: Distributions, tokens: TokenInputs, vocab_size: int
) -> Objective:
    """The objective with a threshold that no token's entropy is near."""
    gate = objective.gate
    if isinstance(gate, EntropyGate) and gate.normalized and vocab_size == 1:
        return replace(objective, gate="always")  # H / log 1
    soft = isinstance(gate, EntropyGate) and gate.sharpness is not None
    if isinstance(gate, str) or soft or not isinstance(gate, EntropyGate | QuantileGate):
        return objective
    entropies = tokens.entropies(p_and_q, gate.of)
    ordered = entropies[tokens.valid].sort().values
    gaps = [i for i in range(len(ordered) - 1) if ordered[i + 1] - ordered[i] > 4 * MARGIN]
    if isinstance(gate, QuantileGate):
        between = (choose.choice(gaps) + 0.5) / (len(ordered) - 1) if gaps else 1.0  # 1: nothing is above the largest
        return replace(objective, gate=replace(gate, quantile=between))
    middles = [float(ordered[i] + ordered[i + 1]) / 2 for i in gaps] or [-1.0, 50.0]
    threshold = choose.choice(middles)
    if vocab_size > 1 and choose.random() < 0.3:
        return replace(objective, gate=replace(gate, threshold=threshold / math.log(vocab_size), normalized=True))
    return replace(objective, gate=replace(gate, threshold=threshold))
