"""The cases: what the project is held to, the heads of models, real data, how cost grows, and the sizes for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import contenders as of
from . import smollm2
from .contenders import FORWARD, GATED, HIDDEN, LOGITS, OURS, PRODUCTS, REVERSE, Contender
from .problems import Shape, hidden_problem, logits_problem
from .records import Case
from .smollm2 import Damage

TARGETS, MODELS, REAL = "targets", "models", "real"
GROWTH_TOKENS, GROWTH_VOCAB, DIVERGENCE = "tokens", "vocabulary", "divergence"
GROUPS = (TARGETS, MODELS, REAL, GROWTH_TOKENS, GROWTH_VOCAB, DIVERGENCE)
TINY = "logits 4 x 32 fp32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A training step that the cases with the heads of models stand for.
STEP_TOKENS = 8_192
DAMAGES = (Damage(noise=0.003), Damage(noise=0.01), Damage(noise=0.03), Damage(cut=1), Damage(cut=4))


@dataclass(frozen=True)
class Head:
    """A model's last layer."""

    vocab: int  # of Gemma-3-4B the 262,144 rows that it shares with Gemma-3-1B
    dim: int
    tied: bool  # whether it is the embedding as well, so that its gradient is needed in any case


HEADS = {
    "SmolLM2-135M": Head(49_152, 576, tied=True),
    "SmolLM2-1.7B": Head(49_152, 2_048, tied=True),
    "Qwen3-0.6B": Head(151_936, 1_024, tied=True),
    "Qwen3-8B": Head(151_936, 4_096, tied=False),
    "Llama-3.2-1B": Head(128_256, 2_048, tied=True),
    "Llama-3.1-8B": Head(128_256, 4_096, tied=False),
    "Gemma-3-1B": Head(262_144, 1_152, tied=True),
    "Gemma-3-4B": Head(262_144, 2_560, tied=True),
}
PAIRS = list(zip([*HEADS][::2], [*HEADS][1::2], strict=True))  # a student and its teacher


def pair(student: str, teacher: str) -> str:
    return " from ".join(f"{name} ({'tied' if HEADS[name].tied else 'not tied'})" for name in (student, teacher))


@dataclass(frozen=True)
class Level:
    """How large the cases are and how long they are repeated. The defaults are those of the published figures."""

    rows: int = 256  # of logits
    logits_vocab: int = 151_936
    tokens: int = 2_048  # of hidden states under SmolLM2's head
    main_tokens: int = 4_096  # beside every peer
    long_tokens: int = 16_384
    vocab: int = 49_152  # of that head
    dim: int = 576
    model_tokens: int = 128  # with the heads of models
    real_tokens: int = 1_024  # of real hidden states
    growth: tuple[int, ...] = (128, 512, 2_048, 8_192, 32_768, 65_536)  # tokens at growth_vocab
    growth_vocab: int = 16_384
    growth_tokens: int = 1_024
    vocabs: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)  # at growth_tokens
    growth_dim: int = 256
    seconds: float = 40  # see benchmarks.measure.rounds
    patience: float = 400
    pairs: Sequence[tuple[str, str]] = tuple(PAIRS)  # of student and teacher
    real_damages: tuple[Damage, ...] = (Damage(noise=0.01), Damage(cut=1))  # of the student, on real data
    damages: tuple[Damage, ...] = DAMAGES  # these and the noises: where only the divergence is of interest
    noises: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)


FULL = Level()
USUAL = Level(
    real_tokens=512,
    growth=(128, 512, 2_048, 8_192),
    growth_tokens=512,
    vocabs=(8_192, 32_768, 131_072, 262_144),
    seconds=15,
    patience=200,
    damages=DAMAGES[1:4],
    noises=(0.001, 0.1),
)
QUICK = Level(
    *(32, 16_384, 128, 256, 512, 4_096, 128),
    model_tokens=32,
    real_tokens=64,
    growth=(128, 512),
    growth_vocab=2_048,
    growth_tokens=64,
    vocabs=(8_192,),
    growth_dim=64,
    seconds=0,
    patience=5,
    pairs=PAIRS[:1],
    real_damages=FULL.real_damages[:1],
    damages=(),
    noises=(0.1,),
)
LEVELS = {"quick": QUICK, "usual": USUAL, "full": FULL}


def cases(level: Level, device: str) -> list[Case]:
    """Returns all cases, in order. On a GPU hidden states and heads are bf16."""
    dtype = "bf16" if device == "cuda" else "fp32"
    made = [*targets(level, dtype), *models(level, dtype), *real(level), *growth(level, dtype), *divergences(level)]
    return made if level is not QUICK else [quick(case) for case in made]


def quick(case: Case) -> Case:
    """Keeps every contender in the targets, and ours elsewhere, since each process takes seconds to start."""
    few = (PRODUCTS, OURS, of.BUDGETED, of.FILTERED[12], of.BACKWARD, of.BACKWARD_FILTERED, of.OURS_REVERSE)
    return replace(case, contenders=tuple(c for c in case.contenders if case.group == TARGETS or c.name in few))


def hidden(names: Iterable[str]) -> tuple[Contender, ...]:
    return tuple(HIDDEN[name] for name in names)


def targets(level: Level, dtype: str) -> list[Case]:
    """Returns the cases that the project is held to."""
    logits = Case(
        TARGETS,
        f"logits {level.rows:,} x {level.logits_vocab:,} fp32",
        partial(logits_problem, level.rows, level.logits_vocab),
        tuple(LOGITS.values()),
        Shape(level.rows, level.logits_vocab),
        error_tokens=32,
        seconds=level.seconds,
    )

    def of_hidden(tokens: int, names: Iterable[str], dtype: str = dtype) -> Case:
        return random_hidden(TARGETS, level, Shape(tokens, level.vocab, level.dim, level.dim), names, dtype)

    made = [
        logits,
        of_hidden(level.tokens, (PRODUCTS, OURS, of.PLAIN, of.UNCHUNKED)),
        of_hidden(level.main_tokens, (PRODUCTS, *GATED, *REVERSE, *FORWARD, of.LCE)),
        of_hidden(level.long_tokens, (PRODUCTS, OURS)),
    ]
    # So few tokens that what a call costs by itself is all of it.
    tiny = replace(logits, name=TINY, source=partial(logits_problem, 4, 32), shape=Shape(4, 32), error_tokens=4)
    made.append(replace(tiny, contenders=(LOGITS[OURS], LOGITS[of.PLAIN])))
    products = (OURS, of.PLAIN, of.DX_BF16, of.DX_FP32)
    return made if dtype == "bf16" else [*made, of_hidden(level.tokens, products, "bf16")]


def random_hidden(group: str, level: Level, shape: Shape, names: Iterable[str], dtype: str = "fp32") -> Case:
    """Makes a case of random hidden states."""
    return Case(
        group,
        f"hidden states {shape} {dtype}",
        partial(hidden_problem, shape, DTYPES[dtype]),
        hidden(names),
        shape,
        dtype,
        seconds=level.seconds,
        patience=level.patience,
    )


def models(level: Level, dtype: str) -> list[Case]:
    """Returns cases of random hidden states under whole heads, with fewer tokens than a training step has."""
    made = []
    for student, teacher in level.pairs:
        shape = Shape(level.model_tokens, HEADS[student].vocab, HEADS[student].dim, HEADS[teacher].dim)
        case = random_hidden(MODELS, level, shape, (PRODUCTS, OURS, of.PLAIN, *REVERSE), dtype)
        name, scale = pair(student, teacher), f"{shape.tokens:,} of {STEP_TOKENS:,} tokens, whole heads"
        made.append(replace(case, name=name, scale=scale, error_tokens=32, patience=level.patience / 2))
    return made


def real(level: Level) -> list[Case]:
    """Returns cases of SmolLM2-135M's hidden states, with a noised and a cut student."""
    names = (PRODUCTS, of.BACKWARD, of.BACKWARD_FILTERED, *GATED, *of.FILTERED.values(), *REVERSE)
    return [smollm2_case(REAL, level, level.real_tokens, damage, names) for damage in level.real_damages]


def smollm2_case(group: str, level: Level, tokens: int, damage: Damage, names: Iterable[str]) -> Case:
    return Case(
        group,
        f"SmolLM2-135M on Python's sources, {damage}, N={tokens:,}",
        partial(smollm2.problem, tokens, damage),
        hidden(names),
        Shape(tokens, smollm2.VOCAB, smollm2.DIM, smollm2.DIM),
        error_tokens=min(tokens, 256),
        seconds=level.seconds,
        patience=level.patience / 2,
    )


def growth(level: Level, dtype: str) -> list[Case]:
    """Returns cases of growing cost under reverse KL, which every peer has: first more tokens, then larger heads."""
    dim, names = level.growth_dim, [PRODUCTS, *REVERSE]
    made = [(GROWTH_TOKENS, Shape(tokens, level.growth_vocab, dim, dim), names) for tokens in level.growth]
    names = [*names, of.BUDGETED]
    made += [(GROWTH_VOCAB, Shape(level.growth_tokens, vocab, dim, dim), names) for vocab in level.vocabs]
    return [
        replace(
            random_hidden(group, level, shape, chosen, dtype),
            error_tokens=0,
            seconds=level.seconds / 2,
            patience=level.patience / 5,
            limit=240.0,
        )
        for group, shape, chosen in made
    ]


def divergences(level: Level) -> list[Case]:
    """Returns cases from a student that is nearly the teacher to one that is far from it, for the errors."""
    names, shape = (*GATED, *REVERSE), Shape(128, level.growth_vocab, level.growth_dim, level.growth_dim)
    made = []
    for noise in level.noises:
        case, source = random_hidden(DIVERGENCE, level, shape, names), partial(hidden_problem, shape, noise=noise)
        made.append(replace(case, name=f"random, noise {noise:g}, {case.name}", source=source, seconds=0.0))
    for damage in level.damages:
        case = smollm2_case(DIVERGENCE, level, min(level.real_tokens, 256), damage, names)
        made.append(replace(case, seconds=0.0))
    return made


GPU_SIZES = ((8192, 128_256), (8192, 151_936), (4096, 151_936), (1024, 151_936))
GPU_SHAPES = [Shape(tokens, vocab, 2048, 4096) for tokens, vocab in GPU_SIZES]
# For a CPU that stands in for the GPU.
TINY_SHAPES = [Shape(6, 130, 8, 12), Shape(9, 70, 8, 12)]


def acceptance(contenders: Iterable[Contender], shapes: Iterable[Shape], device: str) -> list[Case]:
    """Returns the cases of the acceptance run, bf16; each contender makes the problem on the device itself."""
    return [
        Case(
            "acceptance",
            f"N={shape.tokens:,} V={shape.vocab:,} D={shape.student_dim:,}/{shape.teacher_dim:,}",
            partial(hidden_problem, shape, torch.bfloat16, device=device),
            tuple(contenders),
            shape,
            "bf16",
            error_tokens=32,
        )
        for shape in shapes
    ]
