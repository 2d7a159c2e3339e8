"""How a row is cut: a table with its reasons, so that no first call has to search. Knows neither torch nor Triton."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """A program's tile ``[steps, lanes, vector]``: ``lanes`` threads load ``vector`` neighbours ``steps`` times."""

    steps: int
    lanes: int
    vector: int
    num_warps: int

    @property
    def columns(self) -> int:
        return self.steps * self.lanes * self.vector

    @property
    def arguments(self) -> dict[str, Any]:
        """As the kernels take it."""
        return {"STEPS": self.steps, "LANES": self.lanes, "VECTOR": self.vector, "num_warps": self.num_warps}


@dataclass(frozen=True)
class Processor:
    """The device a row is cut for."""

    multiprocessors: int
    warp_size: int
    interpreted: bool = False


# Lanes are threads, so that a lane's sums never leave its registers.
LANES = 256
# A thread loads 16 bytes of the widest dtype at once: the widest load there is.
LOAD_BYTES = 16
# Columns per thread and tile.
COLUMNS_OF_A_LANE = {2: 16, 4: 16, 8: 8}
# A row's parts are merged as lanes of one warp, two each.
MOST_PARTS = 64
# Programs per multiprocessor that a split row is spread over.
RESIDENT = 4


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tiling(widest: int, processor: Processor) -> Tiling:
    """For logits and gradients whose widest dtype has ``widest`` bytes."""
    if processor.interpreted:
        # The interpreter takes a numpy call per operation and tile, whatever the tile's size. Small tiles, so that the
        # small vocabularies of the tests have several, and a ragged end.
        return Tiling(2, 128, 4, 1)
    vector = LOAD_BYTES // widest
    return Tiling(COLUMNS_OF_A_LANE[widest] // vector, LANES, vector, LANES // processor.warp_size)


def parts_of_a_row(n: int, vocab_size: int, cut: Tiling, processor: Processor) -> int:
    """1, unless half the multiprocessors would be idle; then as many parts as the device has room for."""
    if n == 0 or 2 * n >= processor.multiprocessors:
        return 1
    tiles = -(-vocab_size // cut.columns)
    return min(RESIDENT * processor.multiprocessors // n, tiles, MOST_PARTS)
