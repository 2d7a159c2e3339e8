"""What the loss takes beside the models, measured in processes of their own."""

from __future__ import annotations

import pytest

from benchmarks.contenders import GKD, OURS_REVERSE
from benchmarks.problems import Shape
from benchmarks.trl_patch import LOSSES, measured
from tests.processes import fork_what_is_spawned


def test_the_loss_takes_a_quarter_of_what_trls_generalized_jsd_loss_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    fork_what_is_spawned(monkeypatch)
    records = {record.implementation: record for record in measured(Shape(1024, 32_768, 16, 16), 0, LOSSES)}
    assert not any(record.failure for record in records.values())
    theirs, ours = (records[name].peak_bytes or 0 for name in (GKD, OURS_REVERSE))
    assert theirs > 2 * 4 * 1024 * 32_768, "the measurement does not see two sides' logits"
    assert ours < theirs / 4
