"""Which tokens count, and what is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation.answering import Given, SampledAnswers
from distillation.draws import DrawTokens
from distillation.prompts import Prompt
from distillation.rollouts import (
    Completion,
    Rollouts,
    collate,
    completion_mask,
    end_of_sequence_ids,
    sample,
    text_of,
)
from distillation.stream import Draw, PromptStream
from transformers import GenerationConfig

from .conftest import EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_mask_ends_with_the_first_end_token(pad: int) -> None:
    ids = torch.tensor([[5, 6, EOS, pad, pad], [5, EOS, pad, pad, pad], [5, 6, 7, 8, 9], [EOS, pad, pad, pad, pad]])
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert torch.equal(completion_mask(ids, [EOS]), expected)


def test_mask_counts_a_sampled_padding_token_and_any_of_several_ends() -> None:
    ids = torch.tensor([[5, PAD, 6, EOS, PAD], [5, 7, EOS, PAD, PAD]])
    assert completion_mask(ids, [EOS]).sum(dim=1).tolist() == [4, 3]
    assert completion_mask(ids, [EOS, 7]).sum(dim=1).tolist() == [4, 2]


def test_a_batch_is_no_wider_than_its_sequences_and_gives_them_back() -> None:
    # Of three tokens: one that ended, one that did not, and one in which padding was sampled.
    whole = [
        Completion([3, 4, 5], [9, EOS], True),
        Completion([6], [8, 8, 8], False),
        Completion([7], [PAD, EOS], True),
    ]
    batch = collate(whole, PAD, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[3, 4, 5, 9, EOS, PAD], [PAD, PAD, 6, 8, 8, 8], [PAD, PAD, 7, PAD, EOS, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]
    assert batch.lengths.tolist() == [2, 3, 2] and batch.prompt_width == 3
    assert batch.sequences([EOS]) == whole
    assert collate(whole[2:], PAD, torch.device("cpu")).input_ids.tolist() == [[7, PAD, EOS]]


def test_sampling_is_from_the_models_own_distribution_and_leaves_its_config_alone() -> None:
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer(tiny_words())
    model.generation_config = GenerationConfig(
        top_k=1, do_sample=False, repetition_penalty=9.0, temperature=0.1, eos_token_id=EOS, pad_token_id=PAD
    )
    prompt = [3, 4, 5]
    rollouts = sample(model, tokenizer, [prompt] * 4000, max_new_tokens=1)
    assert model.generation_config.top_k == 1 and model.generation_config.repetition_penalty == 9.0
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    drawn = torch.bincount(rollouts.input_ids[:, -1], minlength=VOCABULARY) / 4000
    # Four standard deviations of a binomial share at its widest.
    assert (drawn - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_sampling_may_be_from_the_likeliest_tokens_alone() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
    likeliest = expected.sort(descending=True)
    kept = likeliest.indices[: int((likeliest.values.cumsum(0) < 0.6).sum()) + 1]  # the one that passes 0.6 too
    rollouts = sample(model, tiny_tokenizer(tiny_words()), [[3, 4, 5]] * 4000, max_new_tokens=1, top_p=0.6)
    drawn = torch.bincount(rollouts.input_ids[:, -1], minlength=VOCABULARY) / 4000
    assert 1 < len(kept) < VOCABULARY and set(drawn.nonzero().flatten().tolist()) == set(kept.tolist())
    assert (drawn[kept] - expected[kept] / expected[kept].sum()).abs().max() < 4 * 0.5 / 4000**0.5


def test_sampling_is_not_cut_to_the_likeliest_ids() -> None:
    model = tiny_model("llama", vocab_size=80)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)  # next to uniform: 50 draws expected of each id
    rollouts = sample(model, tiny_tokenizer(tiny_words()), [[3]] * 4000, max_new_tokens=1)
    assert len(rollouts.input_ids[:, -1].unique()) == 80


def test_left_padding_does_not_change_what_is_sampled() -> None:
    # GPT-2 has absolute positions, so a shifted prompt would be another prompt.
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # next to deterministic
    tokenizer = tiny_tokenizer(tiny_words())
    together = sample(model, tokenizer, [[3, 4, 5, 6, 7, 8], [9, 10]], max_new_tokens=6)
    alone = sample(model, tokenizer, [[9, 10]], max_new_tokens=6)
    length = int(alone.lengths[0])
    assert int(together.lengths[1]) == length
    assert together.input_ids[1, 6 : 6 + length].tolist() == alone.input_ids[0, 2 : 2 + length].tolist()


def test_ids_beyond_the_shared_vocabulary_are_never_drawn() -> None:
    rollouts = sample(tiny_model("llama"), tiny_tokenizer(tiny_words()), [[3]] * 200, max_new_tokens=4, vocab_size=6)
    assert rollouts.input_ids.max() < 6


def test_completions_drop_the_end_token_and_mark_what_never_ended() -> None:
    ids = torch.tensor([[3, 4, 5, EOS, PAD], [3, 4, 5, 6, 7], [3, EOS, PAD, PAD, PAD]])
    mask = completion_mask(ids[:, 1:], [EOS])
    found = Rollouts(ids, torch.ones_like(ids), mask).sequences([EOS])
    assert [text_of(one, tiny_tokenizer(tiny_words())) for one in found] == ["w4 w5", "w4 w5 w6 w7", ""]
    assert [one.ended for one in found] == [True, False, True]


def test_end_tokens_come_from_the_model_and_the_tokenizer() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_of_sequence_ids(model, tiny_tokenizer(tiny_words())) == [EOS, 7, 9]


def test_every_prompt_comes_once_a_round_in_an_order_that_the_seed_decides() -> None:
    prompts = [Prompt([i], str(i)) for i in range(10)]
    stream = PromptStream(prompts, 25, seed=0)
    drawn = [stream[i] for i in range(len(stream))]
    assert [draw.number for draw in drawn] == list(range(25))
    orders = [[draw.prompt.ids[0] for draw in drawn[start : start + 10]] for start in (0, 10)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    assert PromptStream(prompts, 25, seed=0)[17] == drawn[17]  # whatever was asked for before
    other = PromptStream(prompts, 10, seed=1)
    assert [other[i].prompt for i in range(10)] != [draw.prompt for draw in drawn[:10]]
    with pytest.raises(IndexError):
        stream[25]


def draws(count: int) -> list[Draw]:
    return [Draw(i, Prompt([3 + i % 7] * (1 + i % 3), "")) for i in range(count)]


def sampled(**options: Any) -> SampledAnswers:
    torch.manual_seed(0)
    student, teacher = tiny_model("llama"), tiny_model("gpt2")
    given = {"seed": 0, "max_new_tokens": 6, "vocab_size": VOCABULARY, **options}
    return SampledAnswers(student, teacher, tiny_tokenizer(tiny_words()), **given)


def test_a_draw_is_answered_alike_in_any_company() -> None:
    together = sampled()(draws(12))
    assert sampled(batch_size=5)(draws(12)) == together
    assert sampled()(draws(12)[7:8]) == together[7:8]
    assert sampled()(list(reversed(draws(12)))) == together[::-1]
    assert sampled(seed=1)(draws(12)) != together
    # The same prompt in two draws: each has numbers of its own.
    assert together[0].prompt == sampled()([Draw(50, draws(1)[0].prompt)])[0].prompt
    assert together[0].ids != sampled()([Draw(50, draws(1)[0].prompt)])[0].ids


def test_the_teacher_answers_its_share_and_the_same_prompts_in_any_batch() -> None:
    source = sampled(off_policy_fraction=0.3)
    chosen = [source.for_teacher(draw) for draw in draws(400)]
    assert 0.2 < sum(chosen) / 400 < 0.4
    students, teachers, mixed = (sampled(off_policy_fraction=f)(draws(30)) for f in (0.0, 1.0, 0.3))
    for student, teacher, found, by_teacher in zip(students, teachers, mixed, chosen, strict=False):
        assert found == (teacher if by_teacher else student)
        assert found.writer == ("teacher" if by_teacher else "student")
    assert [one.ids for one in students] != [one.ids for one in teachers]


def test_given_completions_are_cut_and_do_not_end_then() -> None:
    prompt = Prompt([3], "w3", completion=[4, 5, EOS])
    assert Given(3)([Draw(0, prompt)]) == [Completion([3], [4, 5, EOS], True, writer="data")]
    assert Given(2)([Draw(0, prompt)]) == [Completion([3], [4, 5], False, writer="data")]


def test_a_number_falls_into_the_part_of_its_id() -> None:
    scores = torch.tensor([[0.1, 0.0, 0.2, 0.7]]).log().repeat(5, 1)
    numbers = torch.tensor([[0.0], [0.099], [0.101], [0.301], [1.0]], dtype=torch.float64)
    drawn = DrawTokens(numbers, 2)(torch.zeros(5, 2), scores)
    assert drawn.argmax(-1).tolist() == [0, 0, 2, 3, 3]
    assert (drawn > -torch.inf).sum(-1).tolist() == [1] * 5


def test_what_was_drawn_has_the_log_probability_it_was_drawn_with() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(tiny_words())
    model.generation_config.eos_token_id = list(range(1, 9))  # so that some end early
    rollouts = sample(model, tokenizer, [[3, 4, 5], [6], [7, 8]] * 4, max_new_tokens=6)
    assert rollouts.log_probs is not None and len(set(rollouts.lengths.tolist())) > 1
    with torch.no_grad():
        positions = (rollouts.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(rollouts.input_ids, attention_mask=rollouts.attention_mask, position_ids=positions).logits
    expected = logits[:, rollouts.prompt_width - 1 : -1].log_softmax(-1).gather(2, rollouts.completion_ids[..., None])
    mask = rollouts.completion_mask
    torch.testing.assert_close(rollouts.log_probs[mask], expected[..., 0][mask], rtol=1e-4, atol=1e-5)
    again = collate(rollouts.sequences(end_of_sequence_ids(model, tokenizer)), PAD, torch.device("cpu"))
    assert again.log_probs is not None and torch.equal(again.log_probs[mask], rollouts.log_probs[mask])
    assert (again.log_probs[~mask] == 0).all()
    assert collate([Completion([3], [4], True)], PAD, torch.device("cpu")).log_probs is None
