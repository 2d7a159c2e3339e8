"""The demonstration's task: what is right, what is not, and how success is counted."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from distillation.coins import COINS, LONGEST_ANSWER, Payment, build_tokenizer, draw_problems, ways
from distillation.demonstration import supervised_batches

PAYMENT = Payment(47, 4, (5, 30))


def test_right_answers_are_accepted() -> None:
    assert PAYMENT.prompt == "pay 47 with 4 no 5p 30p :"
    assert Payment(47, 4).prompt == "pay 47 with 4 :"
    assert [Payment.parse(problem.prompt) for problem in (PAYMENT, Payment(47, 4))] == [PAYMENT, Payment(47, 4)]
    assert PAYMENT.accepts("20p 27 15p 12 10p 2 2p 0")
    assert Payment(47, 5).accepts("20p 27 15p 12 8p 4 2p 2 2p 0")
    assert PAYMENT.accepts("2p 45 10p 35 15p 20 20p 0")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "empty"),
        ("20p 27 15p 12 10p 2", "too few coins and something left"),
        ("20p 27 15p 12 8p 4 2p 2 2p 0", "too many coins"),
        ("20p 27 15p 12 10p 2 1p 1", "something left"),
        ("20p 28 15p 12 10p 2 2p 0", "wrong remainder"),
        ("30p 17 10p 7 5p 2 2p 0", "refused coins"),
        ("20p 27 15p 12 8p 4 4p 0", "no such coin"),
        ("20p 27 15p 12 10p 2 2p", "no last remainder"),
        ("27 20p 12 15p 2 10p 0 2p", "wrong order"),
        ("20p 27 15p 12 10p 2 2p 0 <pad>", "something after the end"),
        ("50p -3 1p -4 2p -6 2p 0", "below zero"),
    ],
)
def test_wrong_answers_are_rejected(answer: str, fault: str) -> None:
    assert not PAYMENT.accepts(answer), fault


def test_too_few_coins_are_rejected() -> None:
    assert not Payment(47, 5).accepts("20p 27 15p 12 10p 2 2p 0")


def test_ways_are_those_of_counting() -> None:
    accepted = (1, 2, 3, 5, 8)
    for amount, count in product((0, 4, 9, 14), (0, 1, 2, 4)):
        assert ways(amount, count, accepted) == sum(sum(coins) == amount for coins in product(accepted, repeat=count))


def test_drawn_answers_are_right_and_spread_evenly() -> None:
    payment = Payment(12, 4, (3, 8, 10, 15, 20, 30, 50))
    rng = random.Random(0)
    drawn = [payment.draw_answer(rng) for _ in range(3000)]
    assert all(payment.accepts(answer) for answer in drawn)
    counts = [drawn.count(answer) for answer in set(drawn)]
    assert len(counts) == ways(12, 4, payment.accepted) > 1
    assert min(counts) > 0.8 * 3000 / len(counts)


def test_problems_are_solvable_and_the_held_out_ones_are_new() -> None:
    training, held_out = draw_problems(500, 100, seed=3)
    assert (len(training), len(held_out)) == (500, 100)
    assert not set(training) & set(held_out)
    rng = random.Random(0)
    tokenizer = build_tokenizer()
    for problem in training + held_out:
        answer = problem.draw_answer(rng)
        assert problem.accepts(answer)
        ids = tokenizer(f"{problem.prompt} {answer}")["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(tokenizer(answer)["input_ids"]) == answer
        assert problem.answer_tokens <= LONGEST_ANSWER
    assert {coin for problem in training for coin in problem.refused} == set(COINS)


def test_supervised_labels_are_the_answers_and_nothing_else() -> None:
    tokenizer = build_tokenizer()
    training, _ = draw_problems(50, 1, seed=0)
    by_prompt = {problem.prompt: problem for problem in training}
    batches = supervised_batches(training, tokenizer, random.Random(0), torch.device("cpu"))
    input_ids, attention_mask, labels = next(batches)
    for ids, attended, targets in zip(input_ids, attention_mask, labels, strict=True):
        labelled = targets != -100
        assert torch.equal(ids[labelled], targets[labelled])
        assert targets[-1] == tokenizer.eos_token_id
        problem = by_prompt[str(tokenizer.decode(ids[attended.bool() & ~labelled]))]
        assert problem.accepts(str(tokenizer.decode(ids[labelled][:-1])))
