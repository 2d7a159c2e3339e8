"""How often samples are right, and how sure that is: Avg@k, Pass@k, bootstrap intervals over prompts. No torch.

All of it starts from a matrix of 0 and 1, ``[prompts, samples]``: whether each sample of each prompt is right.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import comb

LEVEL = 0.95
RESAMPLES = 10_000
AT_A_TIME = 2**22  # resampled numbers that exist at once: 32 MiB


class Interval(NamedTuple):
    """An estimate, and the ends of its bootstrap interval."""

    estimate: float
    low: float
    high: float


def pass_rates(correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Pass@k of each prompt, ``[prompts]``, from a matrix ``[prompts, samples]``.

    The probability that at least one of k samples, drawn without replacement from a prompt's, is right: of n samples
    with c right ones 1 − C(n − c, k) / C(n, k), unbiased for k <= n (Chen et al., arXiv 2107.03374). With k = 1 it is
    c/n, and the mean over the prompts is Avg@n.

    Raises:
        ValueError: k is not from 1 to the number of samples.
    """
    matrix = outcomes(correct)
    samples = matrix.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples of a prompt, got {k}")
    return 1 - comb(samples - matrix.sum(axis=1), k) / comb(samples, k)


def outcomes(correct: ArrayLike) -> NDArray[np.int64]:
    """``correct`` as a matrix, checked.

    Raises:
        ValueError: it is not a matrix of 0 and 1 with at least one prompt and one sample.
    """
    try:
        matrix = np.asarray(correct, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("correct must be [prompts, samples] with as many samples for every prompt") from error
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"correct must be [prompts, samples] of 0 and 1, at least one each, got shape {matrix.shape}")
    return matrix.astype(np.int64)


def bootstrap(values: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """The mean over prompts of each column, with its percentile bootstrap interval (:func:`scipy.stats.bootstrap`).

    Prompts are drawn with replacement, whole rows of ``values`` at a time. That covers the choice of the prompts and
    the luck of their samples. It does not cover the luck of a training run: that takes runs with other seeds. Where
    every prompt has the same value, or there is one only, nothing can be resampled, and the interval has no width.

    Args:
        values: ``[prompts]`` or ``[prompts, columns]``, one number for each prompt. Columns are resampled together.
        level: the share of resampled means between the ends. Default 0.95.
        resamples: how many. Default 10,000: at a level of 0.95 each end then moves by some hundredths of the interval's
            width from seed to seed.
        seed: of the generator. The same seed and number of prompts give the same draws.

    Raises:
        ValueError: an argument lies outside what is stated above.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"values must be [prompts] or [prompts, columns], none of them 0, got shape {table.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    found = stats.bootstrap(
        (np.repeat(table, 2, axis=0) if len(table) == 1 else table,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, AT_A_TIME // table.size),
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return [Interval(*map(float, column)) for column in zip(table.mean(axis=0), *found, strict=True)]


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> Interval:
    """The mean of ``values − baseline`` over the prompts that both ``[prompts]`` are about, with its interval.

    A prompt that is hard for both models moves both rates and leaves the difference alone, so that this interval is
    narrower than two intervals laid side by side suggest.

    Raises:
        ValueError: the two are not about the same number of prompts, or as :func:`bootstrap`.
    """
    ours, theirs = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(f"values and baseline must be [prompts] of the same prompts, got {ours.shape}, {theirs.shape}")
    return bootstrap(ours - theirs)[0]
