"""What the loss takes beside the models, measured in processes of their own."""

from __future__ import annotations

from benchmarks.measure import fresh_process

from .conftest import require


def test_the_loss_takes_a_quarter_of_what_trls_generalized_jsd_loss_takes() -> None:
    require("trl")
    from benchmarks.trl_patch import loss_memory

    theirs, ours = (fresh_process(loss_memory, 1024, 32_768, 16, of_trl) for of_trl in (True, False))
    assert theirs > 2 * 4 * 1024 * 32_768, "the measurement does not see two sides' logits"
    assert ours < theirs / 4
