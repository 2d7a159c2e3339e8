"""``python -m benchmarks.communication``: what the loss sends under each kind of parallelism, and a model of the time.

Byte counts are what a rank puts into a collective. Times are arithmetic with the figures of data sheets, not measured.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from .results import markdown_table

MODULE = "benchmarks.communication"
RANKS = (8, 64, 1024)
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds for one message, ``bandwidth`` in bytes per second and direction, of one rank."""

    latency: float
    bandwidth: float


NVLINK = Link(3e-6, 450e9)  # H100: 900 GB/s both ways
INFINIBAND = Link(10e-6, 50e9)  # 400 Gb/s, one adapter for each GPU


def link(ranks: int) -> Link:
    """The slowest link of a ring over so many ranks."""
    return NVLINK if ranks <= RANKS_PER_NODE else INFINIBAND


def ring_all_gather(ranks: int, whole_bytes: float) -> float:
    """Seconds until every rank has all of ``whole_bytes``; a reduce-scatter of as much takes as long."""
    steps, over = ranks - 1, link(ranks)
    return steps * over.latency + whole_bytes * steps / ranks / over.bandwidth


def ring_all_reduce(ranks: int, message_bytes: float) -> float:
    return 2 * ring_all_gather(ranks, message_bytes)


def tree_all_reduce(ranks: int, message_bytes: float) -> float:
    """Up a binary tree and down again, in a pipeline: its depth is in the latency only."""
    depth, over = (ranks - 1).bit_length(), link(ranks)
    return 2 * (depth * over.latency + message_bytes / over.bandwidth)


def all_reduce(ranks: int, message_bytes: float) -> float:
    """The faster of the two, as NCCL chooses."""
    return min(ring_all_reduce(ranks, message_bytes), tree_all_reduce(ranks, message_bytes))


def gather_bytes(vocab_size: int, dim: int, itemsize: int, ranks: int) -> int:
    """What a rank puts into the all-gather of a head sharded on its vocabulary: its rows, padded to the largest."""
    return -(-vocab_size // ranks) * dim * itemsize


def scatter_bytes(vocab_size: int, dim: int, itemsize: int, ranks: int) -> int:
    """What a rank puts into the reduce-scatter of the head's gradient: all of it, padded."""
    return ranks * gather_bytes(vocab_size, dim, itemsize, ranks)


COUNT_BYTES = 8  # global_num_items: one int64, once for each step


def vocabulary_forward_bytes(sampled: bool = False, skewed: bool = False) -> int:
    """fp32 bytes per token: 2 maxima and 6 sums; both sides' logit of the sampled token; 4 numbers of the mixtures."""
    return 4 * (2 + 6 + 2 * sampled + 4 * skewed)


TEACHER_FIRST_BYTES = 4 * (1 + 2)  # per token, fp32: its maximum and two sums, where gates are found before the rest


def vocabulary_top_k_bytes(k: int) -> int:
    """Bytes per token that a rank puts into the gather of the likeliest entries: an id and two logits of each."""
    return k * (4 + 4 + 4)


def vocabulary_hidden_gradient_bytes(dim: int) -> int:
    """Bytes per token of the all-reduce (or reduce-scatter) of the hidden states' gradient, in fp32."""
    return 4 * dim


V, D_S, D_T, TOKENS = 151_936, 1_024, 4_096, 8_192  # Qwen3-0.6B's head under Qwen3-8B's; tokens of one rank


def rows() -> list[list[str]]:
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
    return [[name, *(f"{1e3 * seconds(r):.3g} ms" for r in RANKS)] for name, seconds in kinds.items()]


def table() -> str:
    return markdown_table(("", *(f"{r:,} ranks" for r in RANKS)), rows())


def written(page: str) -> str:
    """The page with the table between its marks replaced."""
    mark = f"<!-- {MODULE} -->"
    return re.sub(f"{mark}.*?{mark}", lambda _: f"{mark}\n\n{table()}\n\n{mark}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="The model of the time, as a table.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="replace the table between this page's marks")
    options = parser.parse_args()
    if options.write is None:
        print(table())
    else:
        options.write.write_text(written(options.write.read_text()))


if __name__ == "__main__":
    main()
