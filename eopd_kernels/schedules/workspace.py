"""Workspace: how many tokens and columns a block of logits has under a budget of bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import tensors
from ..distributed.vocabulary import Shard
from .sides import Side

CPU = torch.device("cpu")
# Where no budget is asked for: the blocks of logits that live at one time (both sides, and the gradient where it has
# memory of its own), and the fewest tokens of a chunk. Each chunk reads both heads and dW again: at V = 151,936 and
# D = 1024 chunks of 103 tokens (128 MiB) cost 27 % over the unchunked products, chunks of 128 cost 15 %. Measured in
# docs/benchmarks.md, "Workspace".
WORKSPACE_BYTES = 128 * 2**20
USUAL_MIN_TOKENS = 128
# The same on a GPU. A chunk of M tokens reads and writes the fp32 dW, 8·V·D bytes, beside a product of 2·M·V·D flops:
# at the data sheets' bf16 rates and bandwidths the product takes as long from M = 4·rate/bandwidth on: 610 (A100),
# 1,180 (H100), 820 (H200), 1,130 (B200). So the budget is some 2,048 tokens of V = 151,936 in bf16, which halves that
# traffic, 8.4 GB a step for 8,192 tokens of V = 128,256, D = 2,048, instead of 16.8 GB in chunks of 1,024; and a chunk
# may have 1,024 tokens even where that exceeds the budget, so that a batch of 1,024 tokens or fewer is never split into
# launches too small to fill the device. Arithmetic, not measured.
GPU_WORKSPACE_BYTES = 3 * 2**30
GPU_USUAL_MIN_TOKENS = 1024
# No budget, however small, makes blocks smaller than these: the products would cost a multiple.
MIN_TOKENS = 32
MIN_COLUMNS = 512
# Slices of the vocabulary begin at multiples of so many entries: rows of a head, columns of logits and of their
# gradient then begin at multiples of 128 bytes in any dtype wherever the whole does.
SLICE_COLUMNS = 128


def usual_workspace(device: torch.device) -> tuple[int, int]:
    """Returns the default budget in bytes, and the fewest tokens of a chunk under it."""
    if tensors.on_host(device):
        return WORKSPACE_BYTES, USUAL_MIN_TOKENS
    return GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS


class Tiling(NamedTuple):
    """The shape of a block: at most so many tokens and so many entries of the vocabulary."""

    tokens: int
    columns: int


def tiling(
    schedule: str,
    n: int,
    student: Side,
    teacher: Side | None,
    gathered: bool,
    workspace_bytes: int | None,
    device: torch.device = CPU,
    shard: Shard | None = None,
) -> Tiling:
    """Returns the shape of a block under a budget of ``workspace_bytes`` for the blocks of both sides.

    Chunks of tokens are made equal in size; a side whose blocks are views of its logits needs no workspace. All ranks
    that share a vocabulary find the same chunks: from the widest shard, and with logits counted whatever their strides.
    Where they do not fit into one chunk, two chunks live at a time (across.py).
    """
    budget, min_tokens = usual_workspace(device) if workspace_bytes is None else (workspace_bytes, MIN_TOKENS)
    vocab_size = student.local_vocab_size if shard is None else shard.widest
    gathered = gathered or shard is not None
    logit_bytes = student.block_bytes(gathered) + student.gradient_bytes()
    if teacher is not None:
        logit_bytes += teacher.block_bytes(gathered)
    if n == 0 or logit_bytes == 0:
        return Tiling(max(n, 1), student.local_vocab_size)
    logits = budget // logit_bytes
    if schedule == "chunked":
        if shard is not None and n * vocab_size > logits:
            logits //= 2
        tokens = max(logits // vocab_size, min_tokens)
        return Tiling(-(-n // -(-n // tokens)), student.local_vocab_size)
    columns = min(max(logits // n // SLICE_COLUMNS * SLICE_COLUMNS, MIN_COLUMNS), vocab_size)
    tokens = max(logits // columns, MIN_TOKENS)
    return Tiling(-(-n // -(-n // tokens)), min(columns, student.local_vocab_size))
