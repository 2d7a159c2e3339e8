"""Chance that belongs to a draw of the run, not to the machine: the same completions however prompts are batched.

A training run is a sequence of draws: its i-th prompt, wherever that is answered, gets uniform numbers of its own, from
a generator seeded with the run's seed and i. So neither the number of processes, nor the size of a batch, nor a resume
changes what is sampled, as far as the logits are the same. In other company they differ in the last bits, which moves
the bounds of the intervals below by about 1e-7: about one token in a million may come out as its neighbour. So may some
more on a device without float64 (MPS), where the bounds themselves are as exact as float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor


def seed_of(*parts: object) -> int:
    """A seed for a generator, the same on every machine, from whatever identifies a draw."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def uniforms(seeds: Iterable[int], count: int) -> Tensor:
    """A row of ``count`` uniform numbers per seed, float64 [B, count] on the CPU: the same for every device."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


class DrawTokens(LogitsProcessor):
    """Turns ``generate``'s greedy choice into sampling at temperature 1 with given uniform numbers.

    The ids of a row share the interval [0, 1) by their probabilities; the one whose part the number of that position
    falls into keeps its score, all others get −inf. ``log_probs`` has those of the ids drawn, in nats, [B] a position.
    """

    def __init__(self, numbers: Tensor, prompt_width: int) -> None:
        # Below 1 by more than is rounded away: the last interval with any probability is the last that can be hit.
        self.numbers = numbers.clamp(max=1 - 2 * torch.finfo(numbers.dtype).eps)  # [B, C], the dtype of the bounds
        self.prompt_width = prompt_width
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One id per row of logits [B, V]; ``input_ids`` [B, P + what was drawn before]."""
        position = input_ids.shape[1] - self.prompt_width
        probabilities = scores.softmax(-1, dtype=torch.float32)
        bounds = probabilities.cumsum(-1, dtype=self.numbers.dtype)
        hit = self.numbers[:, position : position + 1] * bounds[:, -1:]
        drawn = torch.searchsorted(bounds, hit, right=True)
        drawn.clamp_(max=scores.shape[-1] - 1)  # logits of nan have no bounds: the loss will say so
        self.log_probs.append(probabilities.gather(-1, drawn).squeeze(-1).log_())
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
