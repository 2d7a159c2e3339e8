"""Random calls, the same ones every time; ``make fuzz`` runs thousands more."""

from __future__ import annotations

import pytest

from tests.fuzz.calls import draw
from tests.fuzz.compare import check

BLOCK = 25


@pytest.mark.parametrize("block", range(16))
def test_random_calls(block: int) -> None:
    wrong = []
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        call = draw(seed)
        wrong += [f"{call}\n    {line}" for line in check(call)]
    assert not wrong, "\n".join(["replay with `python -m tests.fuzz --seed`:", *wrong])
