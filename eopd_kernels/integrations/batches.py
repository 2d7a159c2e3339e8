"""What a trainer's batches have to say to the loss, whichever library's they are."""

from __future__ import annotations

from .. import Objective, Sampled
from ..arguments import described


def check_objective(objective: Objective) -> None:
    """Refuses what a batch of hidden states or logits does not suffice for."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective or None, got {described(objective)}")
    if isinstance(objective.reverse, Sampled):
        raise ValueError(
            "a trainer's batches have no old log-probabilities, which a sampled reverse half needs: use "
            f"reverse='full' or 'none', got {objective.reverse!r}"
        )
