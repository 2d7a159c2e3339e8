"""Tiny models that can be run one sequence at a time as the truth, and folders with such models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 40
PAD, EOS = 0, 1

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=48, bos_token_id=None, eos_token_id=EOS
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=EOS
    ),
    "phi": lambda: PhiConfig(**SMALL),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=3.0),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=0.25),
}


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib lays out and writes no figure of a run's page, which takes it as long as the run; all else is done.
    Figures are written in test_page.py, test_distill_program.py and, of a whole run, test_distill_resume.py."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, stream, **options: stream.write("<svg></svg>"))


def tiny_model(architecture: str, **changes: int) -> PreTrainedModel:
    """A random model whose logits are spread wide enough to tell tokens, positions, biases and scales apart."""
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tiny_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_words(size: int = VOCABULARY) -> list[str]:
    return ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, size))]


@pytest.fixture
def saved_model(tmp_path: Path) -> Callable[..., str]:
    """Saves a tiny model with a tokenizer and returns the folder."""

    def save(name: str, architecture: str, words: list[str], **changes: int) -> str:
        folder = tmp_path / name
        tiny_model(architecture, **changes).save_pretrained(folder)
        tiny_tokenizer(words).save_pretrained(folder)
        return str(folder)

    return save
