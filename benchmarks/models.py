"""The heads of models in use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """A model's last layer.

    Args:
        vocab: its rows; of Gemma-3-4B the 262,144 that it shares with Gemma-3-1B.
        dim: the hidden size.
        tied: whether it is the embedding as well, so that its gradient is needed in any case.
    """

    vocab: int
    dim: int
    tied: bool


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
# A student and its teacher.
PAIRS = [
    ("SmolLM2-135M", "SmolLM2-1.7B"),
    ("Qwen3-0.6B", "Qwen3-8B"),
    ("Llama-3.2-1B", "Llama-3.1-8B"),
    ("Gemma-3-1B", "Gemma-3-4B"),
]


def tie(name: str) -> str:
    return f"{name} ({'tied' if HEADS[name].tied else 'not tied'})"
