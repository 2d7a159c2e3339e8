"""Which tokens count, and what is sampled."""

from __future__ import annotations

import pytest
import torch
from distillation.prompts import shuffled_batches
from distillation.rollouts import Rollouts, completion_mask, completions, end_of_sequence_ids, left_pad, sample
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


def test_split_trims_columns_and_keeps_every_valid_token() -> None:
    prompts, attention = left_pad([[3, 4, 5], [6], [7, 8]], PAD, torch.device("cpu"))
    answers = torch.tensor([[9, 9, 9, 9, EOS], [8, EOS, PAD, PAD, PAD], [7, 7, EOS, PAD, PAD]])
    mask = completion_mask(answers, [EOS])
    whole = Rollouts(torch.cat([prompts, answers], 1), torch.cat([attention, mask.long()], 1), mask)
    first, second = whole.split(1), list(whole.split(2))[1]
    assert [part.completion_mask.shape[1] for part in first] == [5, 2, 3]
    assert second.prompt_width == 2
    assert second.input_ids.tolist() == [[7, 8, 7, 7, EOS]]
    assert sum(int(part.lengths.sum()) for part in whole.split(2)) == int(whole.lengths.sum()) == 10


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
    texts = completions(Rollouts(ids, torch.ones_like(ids), mask), tiny_tokenizer(tiny_words()), [EOS])
    assert texts == ["w4 w5", None, ""]


def test_end_tokens_come_from_the_model_and_the_tokenizer() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_of_sequence_ids(model, tiny_tokenizer(tiny_words())) == [EOS, 7, 9]


def test_every_prompt_comes_once_a_round() -> None:
    prompts = [[i] for i in range(10)]
    stream = shuffled_batches(prompts, 4, seed=0)
    drawn = [prompt for _ in range(5) for prompt in next(stream)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == prompts
    assert drawn[:10] != drawn[10:]
