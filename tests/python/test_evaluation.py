"""Avg@k, Pass@k and their intervals against enumeration, and which completions count as right."""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from distillation import success
from distillation.evaluation import right
from distillation.rollouts import Rollouts, completion_mask
from distillation.success import bootstrap, paired_difference, pass_rates

from .conftest import EOS, PAD, tiny_tokenizer, tiny_words

VALUES = np.array([0.0, 0.125, 0.25, 0.875, 1.0])


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Pass@k of one prompt."""
    return float(pass_rates([[int(i < correct) for i in range(samples)]], k)[0])


@pytest.mark.parametrize(("samples", "k"), [(8, 1), (8, 8), (10, 3), (5, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples: int, k: int) -> None:
    for correct in range(samples + 1):
        outcomes = [i < correct for i in range(samples)]
        subsets = list(combinations(outcomes, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("chance", [0.0, 0.13, 0.5, 1.0])
def test_pass_at_k_is_unbiased(chance: float) -> None:
    samples, k = 7, 3
    expectation = sum(
        comb(samples, c) * chance**c * (1 - chance) ** (samples - c) * pass_at_k(samples, c, k)
        for c in range(samples + 1)
    )
    assert expectation == pytest.approx(1 - (1 - chance) ** k)


def test_rates_of_a_matrix_are_those_of_its_rows() -> None:
    matrix = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    for k in (1, 2, 3, 4):
        by_hand = [np.mean([any(subset) for subset in combinations(row, k)]) for row in matrix]
        assert pass_rates(matrix, k) == pytest.approx(by_hand)
    assert pass_rates(matrix, 1) == pytest.approx([0.25, 0.0, 0.75])


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_is_the_enumeration_of_all_resamples(level: float) -> None:
    means = [np.mean(drawn) for drawn in product(VALUES, repeat=len(VALUES))]  # 3,125, equally likely
    (found,) = bootstrap(VALUES, level=level, resamples=200_000)
    assert found.estimate == VALUES.mean()
    # The distribution is discrete: an end may fall on the next of its values, which lie 0.025 apart at most here.
    assert found.low == pytest.approx(np.quantile(means, (1 - level) / 2), abs=0.026)
    assert found.high == pytest.approx(np.quantile(means, (1 + level) / 2), abs=0.026)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    experiments = generator.beta(0.6, 0.9, size=(60, 400))  # 60 prompts each, of true mean 0.4
    intervals = bootstrap(experiments, resamples=2000)  # the columns share their draws, not their values
    held = np.mean([interval.low <= 0.4 <= interval.high for interval in intervals])
    assert 0.92 < held < 0.98


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(40)
    first = bootstrap(values, resamples=501, seed=3)
    assert bootstrap(values, resamples=501, seed=4) != first
    monkeypatch.setattr(success, "AT_A_TIME", 280)  # seven resamples in a block
    assert bootstrap(values, resamples=501, seed=3)[0] == pytest.approx(first[0])
    both = bootstrap(np.stack([values, 1 - values], axis=1), resamples=501, seed=3)
    assert both[0] == pytest.approx(first[0])
    assert both[1].low == pytest.approx(1 - first[0].high)


def test_a_paired_difference_leaves_out_what_both_share() -> None:
    hard = np.linspace(0, 0.9, 40)
    better = hard + 0.05 + 0.02 * np.cos(np.arange(40))
    difference = paired_difference(better, hard)
    assert 0.03 < difference.low < difference.estimate < difference.high < 0.07
    (ours,), (theirs,) = bootstrap(better), bootstrap(hard)
    assert ours.low < theirs.high  # side by side the two could not be told apart
    assert paired_difference(hard, hard) == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pass_at_k(4, 1, 5), "k must be"),
        (lambda: pass_rates([[0, 1], [1]], 1), "as many samples"),
        (lambda: pass_rates([], 1), r"shape \(0,\)"),
        (lambda: pass_rates([[0, 2]], 1), "0 and 1"),
        (lambda: bootstrap([]), r"shape \(0, 1\)"),
        (lambda: bootstrap(VALUES, level=95), "level"),
        (lambda: bootstrap(VALUES, resamples=0), "resamples"),
        (lambda: paired_difference(VALUES, VALUES[:3]), "same prompts"),
    ],
)
def test_bad_input_is_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_right_answers_are_those_that_a_check_accepts_and_that_end() -> None:
    words = tiny_words()
    answers = [["w9", "w9 w9", "w9 …"], ["w9", "w7", "w7"]]  # "…": without an end
    rows = []
    for text in (text for texts in answers for text in texts):
        ids = [words.index(word) for word in text.split() if word != "…"]
        rows.append([5, *ids, *([words.index("w9")] * (3 - len(ids)) if "…" in text else [EOS, PAD][: 3 - len(ids)])])
    input_ids = torch.tensor(rows)
    mask = completion_mask(input_ids[:, 1:], [EOS])
    attention_mask = torch.cat([torch.ones_like(input_ids[:, :1]), mask.long()], dim=1)
    checks = [lambda text: set(text.split()) == {"w9"}] * 3 + [lambda text: text == "w7"] * 3
    found = right(Rollouts(input_ids, attention_mask, mask).sequences([EOS]), tiny_tokenizer(words), checks)
    assert found == [1, 1, 0, 0, 1, 1]
