"""The model of communication times: its limits, and the table on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import communication as model
from benchmarks.page import replace_block
from eopd_kernels.testing import messages

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def test_the_page_has_the_table_of_the_model(tmp_path: Path) -> None:
    copy = tmp_path / PAGE.name
    copy.write_text(PAGE.read_text().replace("0.626 ms", "0.1 ms"))
    replace_block(copy, "communication", model.table())
    assert copy.read_text() == PAGE.read_text()


def test_large_messages_take_the_bandwidth_and_small_ones_the_latency() -> None:
    for ranks in (8, 64, 1024):
        over = model.link(ranks)
        assert model.ring_all_gather(ranks, 1e15) == pytest.approx(1e15 * (1 - 1 / ranks) / over.bandwidth, rel=1e-2)
        assert model.ring_all_gather(ranks, 0) == pytest.approx((ranks - 1) * over.latency)
        assert model.all_reduce(ranks, 0) == pytest.approx(2 * (ranks - 1).bit_length() * over.latency)
        assert model.all_reduce(ranks, 1e15) == model.ring_all_reduce(ranks, 1e15)
    assert model.all_reduce(1, 1e9) == 0


def test_shards_are_padded_to_the_largest() -> None:
    assert [messages.gather_bytes(37, 8, 4, ranks) for ranks in (1, 2, 37, 64)] == [37 * 32, 19 * 32, 32, 32]
    assert messages.scatter_bytes(37, 8, 4, 2) == 38 * 32


def test_bytes_per_token_of_the_vocabulary_parallel_loss() -> None:
    assert [messages.vocabulary_forward_bytes(*of) for of in [(), (True,), (False, True)]] == [32, 40, 48]
    assert (messages.vocabulary_top_k_bytes(16), messages.vocabulary_hidden_gradient_bytes(1024)) == (192, 4096)
