"""What a trainer's batches and heads have to say to the loss, whichever library's they are."""

from __future__ import annotations

from typing import Any

from .. import LMHead, Objective, Sampled
from ..arguments import described
from ..heads.from_model import unwrapped
from ..inputs.keywords import with_defaults

# Keywords of the loss that an adapter takes beside the objective: how it is computed.
HOW = ("schedule", "backend", "workspace_bytes", "gradient_filter", "wait_free")


def check_how(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns an adapter's options for the loss, which are among HOW.

    Raises:
        TypeError: in the name of ``function``: one of them is not.
    """
    with_defaults(function, options, HOW)
    return options


def check_objective(objective: Objective) -> None:
    """Refuses what a batch of hidden states or logits does not suffice for."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective or None, got {described(objective)}")
    if isinstance(objective.reverse, Sampled):
        raise ValueError(
            "a trainer's batches have no old log-probabilities, which a sampled reverse half needs: use "
            f"reverse='full' or 'none', got {objective.reverse!r}"
        )


def check_plain_head(name: str, model: Any, library: str, bias: bool = True) -> None:
    """Refuses a model whose logits are more than its hidden states times what a library hands over of its head.

    Args:
        name: of the model, for the message.
        bias: whether the library hands over the bias beside the weight.
    """
    head = LMHead.from_model(model)
    if (head.scale, head.softcap) != (1.0, None) or (head.bias is not None and not bias):
        raise ValueError(
            f"{name} must have plain logits, got scale={head.scale}, softcap={head.softcap} and "
            f"{'no' if head.bias is None else 'a'} bias of a {type(unwrapped(model)).__name__}: {library} hands over "
            f"the head's weight{' and bias' if bias else ''} alone"
        )
    if head.weight is not unwrapped(model).get_output_embeddings().weight:
        raise ValueError(
            f"{name} must have an output layer without an adapter, of which {library} hands over the base alone: leave "
            "it out of the adapter's target modules, or train it whole"
        )
