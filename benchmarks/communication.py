"""``python -m benchmarks.communication``: a model of the time that the loss's messages take under each parallelism.

Byte counts are what a rank puts into a collective. Times are arithmetic with the figures of data sheets, not measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from eopd_kernels.testing.messages import COUNT_BYTES, vocabulary_forward_bytes, vocabulary_hidden_gradient_bytes

from .page import markdown_table, replace_block

MODULE = "benchmarks.communication"
RANKS = (8, 64, 1024)
RANKS_PER_NODE = 8
V, D_S, D_T, TOKENS = 151_936, 1_024, 4_096, 8_192  # Qwen3-0.6B's head under Qwen3-8B's; tokens of one rank


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds for one message, ``bandwidth`` in bytes per second and direction, of one rank."""

    latency: float
    bandwidth: float


NVLINK = Link(3e-6, 450e9)  # H100: 900 GB/s both ways
INFINIBAND = Link(10e-6, 50e9)  # 400 Gb/s, one adapter for each GPU


def link(ranks: int) -> Link:
    """Returns the slowest link of a ring over so many ranks."""
    return NVLINK if ranks <= RANKS_PER_NODE else INFINIBAND


def ring_all_gather(ranks: int, whole_bytes: float) -> float:
    """Returns the seconds until every rank has all of ``whole_bytes``; a reduce-scatter of as much takes as long."""
    steps, over = ranks - 1, link(ranks)
    return steps * over.latency + whole_bytes * steps / ranks / over.bandwidth


def ring_all_reduce(ranks: int, message_bytes: float) -> float:
    return 2 * ring_all_gather(ranks, message_bytes)


def tree_all_reduce(ranks: int, message_bytes: float) -> float:
    """Returns the seconds up a binary tree and down again, in a pipeline, so that only the latency has its depth."""
    depth, over = (ranks - 1).bit_length(), link(ranks)
    return 2 * (depth * over.latency + message_bytes / over.bandwidth)


def all_reduce(ranks: int, message_bytes: float) -> float:
    """Returns the seconds of the faster of ring and tree, as NCCL chooses."""
    return min(ring_all_reduce(ranks, message_bytes), tree_all_reduce(ranks, message_bytes))


def table() -> str:
    """Formats the milliseconds of each kind of message by the number of ranks."""
    student, teacher = V * D_S * 2, V * D_T * 2
    forward, hidden = (TOKENS * b for b in (vocabulary_forward_bytes(), vocabulary_hidden_gradient_bytes(D_S)))
    kinds = {
        "count of tokens, per step": lambda r: all_reduce(r, COUNT_BYTES),
        "FSDP2: student's head, per call": lambda r: ring_all_gather(r, student),
        "FSDP2: its gradient, per call": lambda r: ring_all_gather(r, student),
        "FSDP2: teacher's head, per call": lambda r: ring_all_gather(r, teacher),
        "tensor parallelism: sums, per call": lambda r: all_reduce(r, forward / 4) + all_reduce(r, forward * 3 / 4),
        "tensor parallelism: dX, per call": lambda r: all_reduce(r, hidden),
    }
    rows = [[name, *(f"{1e3 * seconds(r):.3g} ms" for r in RANKS)] for name, seconds in kinds.items()]
    return markdown_table(("", *(f"{r:,} ranks" for r in RANKS)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="The model of the time, as a table.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="replace the table between this page's marks")
    options = parser.parse_args()
    if options.write is None:
        print(table())
    else:
        replace_block(options.write, "communication", table())


if __name__ == "__main__":
    main()
