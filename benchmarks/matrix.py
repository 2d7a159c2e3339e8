"""The cases: what the project is held to, the heads of models, real data, and how cost grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import smollm2
from .case import Case
from .implementations import (
    ADD,
    BACKWARD,
    BACKWARD_FILTERED,
    BUDGETED,
    COMPILED,
    DX_BF16,
    DX_FP32,
    FILTERED,
    GKD,
    HIDDEN,
    HUGE,
    INPLACE,
    KERNEL,
    LIGER,
    LOGITS,
    ORDA,
    ORDA_GATED,
    OURS,
    OURS_FORWARD,
    OURS_REVERSE,
    PLAIN,
    PRODUCTS,
    SCALED,
    TOUCH,
    TRL,
    UNCHUNKED,
    Implementation,
)
from .models import HEADS, PAIRS, tie
from .problems import hidden_problem, logits_problem
from .smollm2 import Damage

TUNE, TUNE_FORWARD, FLA = "torchtune chunked reverse KL", "torchtune chunked forward KL", "fla fused_kl_div, forward KL"
TRL_JSD, LIGER_JSD, LCE = "trl chunked_divergence, JSD", "Liger fused linear JSD", "F.linear_cross_entropy, one head"
# In each round the quickest peer comes right after ours, so that both meet what disturbs the machine for seconds.
GATED = (OURS, COMPILED, PLAIN, ORDA_GATED)
REVERSE = (OURS_REVERSE, LIGER, TRL, GKD, ORDA, TUNE)
FORWARD = (OURS_FORWARD, TUNE_FORWARD, FLA, TRL_JSD, LIGER_JSD)

TARGETS, MODELS, REAL = "targets", "models", "real"
GROWTH_TOKENS, GROWTH_VOCAB, DIVERGENCE = "tokens", "vocabulary", "divergence"
GROUPS = (TARGETS, MODELS, REAL, GROWTH_TOKENS, GROWTH_VOCAB, DIVERGENCE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A training step that the cases with the heads of models stand for.
STEP_TOKENS = 8_192


@dataclass(frozen=True)
class Level:
    """How large the cases are and how long they are repeated.

    Args:
        rows, logits_vocab: of the logits.
        tokens, main_tokens, long_tokens: of hidden states under SmolLM2's head; ``main_tokens`` beside every peer.
        vocab, dim: of that head.
        model_tokens, real_tokens: with the heads of models, and of real hidden states.
        growth: the numbers of tokens at ``growth_vocab``, and the vocabularies at ``growth_tokens``.
        seconds, patience: see :func:`benchmarks.measure.rounds`.
        pairs: of student and teacher. ``real_damages``: of the student, on real data; ``damages``, ``noises``: where
            only the divergence is of interest.
    """

    rows: int
    logits_vocab: int
    tokens: int
    main_tokens: int
    long_tokens: int
    vocab: int
    dim: int
    model_tokens: int
    real_tokens: int
    growth: tuple[int, ...]
    growth_vocab: int
    growth_tokens: int
    vocabs: tuple[int, ...]
    growth_dim: int
    seconds: float
    patience: float
    pairs: tuple[tuple[str, str], ...]
    real_damages: tuple[Damage, ...]
    damages: tuple[Damage, ...]
    noises: tuple[float, ...]


REAL_DAMAGES = (Damage(noise=0.01), Damage(cut=1))
DAMAGES = (Damage(noise=0.003), Damage(noise=0.01), Damage(noise=0.03), Damage(cut=1), Damage(cut=4))
FULL = Level(
    *(256, 151_936, 2_048, 4_096, 16_384, 49_152, 576),
    model_tokens=128,
    real_tokens=1_024,
    growth=(128, 512, 2_048, 8_192, 32_768, 65_536),
    growth_vocab=16_384,
    growth_tokens=1_024,
    vocabs=(8_192, 16_384, 32_768, 65_536, 131_072, 262_144),
    growth_dim=256,
    seconds=40,
    patience=400,
    pairs=tuple(PAIRS),
    real_damages=REAL_DAMAGES,
    damages=DAMAGES,
    noises=(0.001, 0.01, 0.1, 1.0),
)
USUAL = Level(
    *(256, 151_936, 2_048, 4_096, 16_384, 49_152, 576),
    model_tokens=128,
    real_tokens=512,
    growth=(128, 512, 2_048, 8_192),
    growth_vocab=16_384,
    growth_tokens=512,
    vocabs=(8_192, 32_768, 131_072, 262_144),
    growth_dim=256,
    seconds=15,
    patience=200,
    pairs=tuple(PAIRS),
    real_damages=REAL_DAMAGES,
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
    pairs=(PAIRS[0],),
    real_damages=REAL_DAMAGES[:1],
    damages=(),
    noises=(0.1,),
)
LEVELS = {"quick": QUICK, "usual": USUAL, "full": FULL}


def cases(level: Level, device: str) -> list[Case]:
    """All of them, in order. On a GPU hidden states and heads are bf16."""
    dtype = "bf16" if device == "cuda" else "fp32"
    made = [
        *targets(level, dtype),
        *models(level, dtype),
        *real(level),
        *growth(level, dtype),
        *divergences(level),
    ]
    return made if level is not QUICK else [quick(case) for case in made]


def quick(case: Case) -> Case:
    """Every implementation once, in the targets; elsewhere ours, since a process takes seconds to start."""
    few = (PRODUCTS, OURS, BUDGETED, FILTERED[12], BACKWARD, BACKWARD_FILTERED, OURS_REVERSE)
    kept = tuple(i for i in case.implementations if case.group == TARGETS or i.name in few)
    return replace(case, implementations=kept)


def hidden(names: Iterable[str]) -> tuple[Implementation, ...]:
    return tuple(HIDDEN[name] for name in names)


def targets(level: Level, dtype: str) -> list[Case]:
    """What the project is held to."""
    of_logits = (ADD, KERNEL, OURS, INPLACE, PLAIN, COMPILED, OURS_REVERSE, GKD, TOUCH, HUGE, SCALED)
    shape = f"{level.rows:,} x {level.logits_vocab:,}"
    every = (PRODUCTS, *GATED, *REVERSE, *FORWARD, LCE)
    logits = Case(
        TARGETS,
        f"logits {shape} fp32",
        partial(logits_problem, level.rows, level.logits_vocab),
        tuple(LOGITS[name] for name in of_logits),
        level.rows,
        level.logits_vocab,
        error_tokens=32,
        seconds=level.seconds,
    )

    def of_hidden(tokens: int, names: Iterable[str], dtype: str = dtype) -> Case:
        return random_hidden(TARGETS, level, tokens, level.vocab, level.dim, names, dtype)

    made = [
        logits,
        of_hidden(level.tokens, (PRODUCTS, OURS, PLAIN, UNCHUNKED)),
        of_hidden(level.main_tokens, every),
        of_hidden(level.long_tokens, (PRODUCTS, OURS)),
    ]
    return made if dtype == "bf16" else [*made, of_hidden(level.tokens, (OURS, PLAIN, DX_BF16, DX_FP32), "bf16")]


def random_hidden(
    group: str, level: Level, tokens: int, vocab: int, dim: int, names: Iterable[str], dtype: str = "fp32"
) -> Case:
    """Random hidden states, student and teacher of one size."""
    return Case(
        group,
        f"hidden states N={tokens:,}, V={vocab:,}, D={dim:,} {dtype}",
        partial(hidden_problem, tokens, vocab, dim, DTYPES[dtype]),
        hidden(names),
        tokens,
        vocab,
        dim,
        dim,
        dtype,
        seconds=level.seconds,
        patience=level.patience,
    )


def models(level: Level, dtype: str) -> list[Case]:
    """Random hidden states under whole heads: the tokens are what the machine's time and memory scale down."""
    made = []
    for student, teacher in level.pairs:
        head, teacher_dim = HEADS[student], HEADS[teacher].dim
        made.append(
            Case(
                MODELS,
                f"{tie(student)} from {tie(teacher)}",
                partial(
                    hidden_problem,
                    level.model_tokens,
                    head.vocab,
                    head.dim,
                    DTYPES[dtype],
                    teacher_dim=teacher_dim,
                ),
                hidden((PRODUCTS, OURS, PLAIN, *REVERSE)),
                level.model_tokens,
                head.vocab,
                head.dim,
                teacher_dim,
                dtype,
                scale=f"{level.model_tokens:,} of {STEP_TOKENS:,} tokens, whole heads",
                error_tokens=32,
                seconds=level.seconds,
                patience=level.patience / 2,
            )
        )
    return made


def real(level: Level) -> list[Case]:
    """SmolLM2-135M's hidden states; a noised and a cut student."""
    names = (PRODUCTS, BACKWARD, BACKWARD_FILTERED, *GATED, *FILTERED.values(), *REVERSE)
    return [smollm2_case(REAL, level, level.real_tokens, damage, names) for damage in level.real_damages]


def smollm2_case(group: str, level: Level, tokens: int, damage: Damage, names: Iterable[str]) -> Case:
    return Case(
        group,
        f"SmolLM2-135M on Python's sources, {damage}, N={tokens:,}",
        partial(smollm2.problem, tokens, damage),
        hidden(names),
        tokens,
        smollm2.VOCAB,
        smollm2.DIM,
        smollm2.DIM,
        error_tokens=min(tokens, 256),
        seconds=level.seconds,
        patience=level.patience / 2,
    )


def growth(level: Level, dtype: str) -> list[Case]:
    """Reverse KL, which every peer has: more tokens under one head, then larger heads at one number of tokens."""
    names = (PRODUCTS, *REVERSE)
    shapes: list[tuple[str, int, int, tuple[str, ...]]]
    shapes = [(GROWTH_TOKENS, tokens, level.growth_vocab, names) for tokens in level.growth]
    shapes += [(GROWTH_VOCAB, level.growth_tokens, vocab, (*names, BUDGETED)) for vocab in level.vocabs]
    return [
        replace(
            random_hidden(group, level, tokens, vocab, level.growth_dim, chosen, dtype),
            error_tokens=0,
            seconds=level.seconds / 2,
            patience=level.patience / 5,
            limit=240.0,
        )
        for group, tokens, vocab, chosen in shapes
    ]


def divergences(level: Level) -> list[Case]:
    """Errors from a student that is nearly the teacher to one that is far from it. Times are taken along."""
    names = (*GATED, *REVERSE)
    made = []
    for noise in level.noises:
        case = random_hidden(DIVERGENCE, level, 128, level.growth_vocab, level.growth_dim, names)
        source = partial(hidden_problem, 128, level.growth_vocab, level.growth_dim, noise=noise)
        made.append(replace(case, name=f"random, noise {noise:g}, {case.name}", source=source, seconds=0.0))
    for damage in level.damages:
        case = smollm2_case(DIVERGENCE, level, min(level.real_tokens, 256), damage, names)
        made.append(replace(case, seconds=0.0))
    return made
