"""The prompts of a run in the order in which they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from .draws import seed_of
from .prompts import Prompt


class Draw(NamedTuple):
    """The ``number``-th prompt of the run."""

    number: int
    prompt: Prompt


class PromptStream(Dataset[Draw]):
    """As many draws as a run needs: every prompt once per round, each round in an order of its own.

    A pure function of the seed and the position, so that a resumed run and a run on several processes go on where, and
    share what, one process would have drawn. Rounds run into each other: no batch is smaller than the others.
    """

    def __init__(self, prompts: Sequence[Prompt], draws: int, seed: int) -> None:
        self.prompts = prompts
        self.draws = draws
        self.seed = seed
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, number: int) -> Draw:
        if not 0 <= number < self.draws:
            raise IndexError(number)
        turn, place = divmod(number, len(self.prompts))
        return Draw(number, self.prompts[self.order(turn)[place]])

    def _order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, turn))
        return torch.randperm(len(self.prompts), generator=generator).tolist()
