"""The part of a transformers model whose output its head reads."""

from __future__ import annotations

from torch import nn

from .from_model import unwrapped


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the module of a causal language model whose ``last_hidden_state`` its head reads.

    It is what the model's own forward calls, so that a hook on it sees the hidden states on their way. That is
    ``get_decoder()`` of the model, or of the language model inside of it, in every family of transformers 5.24 that was
    tried; where that returns the model itself, its attribute ``model``.

    Args:
        model: a model with a head, also inside torch.compile, data parallelism or PEFT.
    """
    part = unwrapped(model)
    while callable(getattr(part, "get_output_embeddings", None)) and part.get_output_embeddings() is not None:
        decoder = part.get_decoder()
        inner = getattr(part, "model", part) if decoder is part else decoder
        if inner is part:
            break
        part = inner
    return part
