"""The bytes that a rank puts into each collective of the loss; tests compare them with what gloo is given."""

from __future__ import annotations

COUNT_BYTES = 8  # global_num_items: one int64 for each step
# The teacher's maximum and two sums of a token, in fp32, where gates are found before the rest.
TEACHER_FIRST_BYTES = 4 * (1 + 2)


def gather_bytes(vocab_size: int, dim: int, itemsize: int, ranks: int) -> int:
    """The all-gather of a head that is sharded over its vocabulary: a rank's rows, padded to the largest shard."""
    return -(-vocab_size // ranks) * dim * itemsize


def scatter_bytes(vocab_size: int, dim: int, itemsize: int, ranks: int) -> int:
    """The reduce-scatter of that head's gradient: all of it, padded."""
    return ranks * gather_bytes(vocab_size, dim, itemsize, ranks)


def vocabulary_forward_bytes(sampled: bool = False, skewed: bool = False) -> int:
    """The row sums of a token under vocabulary parallelism, in fp32: 2 maxima and 6 sums.

    ``sampled`` adds the sampled token's logit of both sides, ``skewed`` the 4 numbers of the mixtures.
    """
    return 4 * (2 + 6 + 2 * sampled + 4 * skewed)


def vocabulary_top_k_bytes(k: int) -> int:
    """The gather of a token's likeliest entries: an id and two logits of each."""
    return k * (4 + 4 + 4)


def vocabulary_hidden_gradient_bytes(dim: int) -> int:
    """The all-reduce, or reduce-scatter, of a token's hidden-state gradient, in fp32."""
    return 4 * dim
