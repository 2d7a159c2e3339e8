"""What a trainer's batches have to say to the loss, whichever library's they are."""

from __future__ import annotations

from typing import Any

from .. import Objective, Sampled
from ..arguments import described
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
