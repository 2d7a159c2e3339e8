"""What a trainer's batches have to say to the loss, whichever library's they are."""

from __future__ import annotations

from torch import Tensor

from .. import Objective, Sampled


def check_objective(objective: Objective) -> None:
    """Refuses what a batch of hidden states or logits does not suffice for."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective or None, got {objective!r}")
    if isinstance(objective.reverse, Sampled):
        raise ValueError(
            "a trainer's batches have no old log-probabilities, which a sampled reverse half needs: use "
            f"reverse='full' or 'none', got {objective.reverse!r}"
        )


def on_device(num_items: Tensor | int | None, like: Tensor) -> Tensor | int | None:
    return num_items.to(like.device) if isinstance(num_items, Tensor) else num_items
