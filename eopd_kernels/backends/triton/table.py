"""How a row is cut: a table with its reasons, so that no first call has to search. Knows neither torch nor Triton."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A program's tile ``[steps, lanes, vector]``: ``lanes`` threads load ``vector`` neighbours ``steps`` times."""

    steps: int
    lanes: int
    vector: int
    num_warps: int
    options: Mapping[str, int]  # further ones of the compiler

    @property
    def columns(self) -> int:
        return self.steps * self.lanes * self.vector


@dataclass(frozen=True)
class Processor:
    """The device a row is cut for."""

    multiprocessors: int
    warp_size: int
    amd: bool = False
    interpreted: bool = False


# Lanes are threads, so that a lane's sums never leave its registers.
LANES = 256
# A thread loads 16 bytes of the widest dtype at once: the widest load there is.
LOAD_BYTES = 16
# Columns per thread and tile. row_loss_and_gradient, fp32, sm_90, registers and instructions per column of both loops:
# 48 and 60.6 with 8, 90 and 59.4 with 16, 237 and 61.8 with 32; sm_100: 52 and 58.3, 80 and 55.4, 140 and 54.9. On
# gfx942, 16 spill scalar registers (10) and 8 do not. Half the registers are twice the programs that hide a load.
LANE_COLUMNS = 8
# A column of a skewed divergence holds twice the numbers: as many as 16 bytes are in the dtype computed in. With 8,
# row_mixture_gradient in fp32 with both softcaps spilled 8 to 16 bytes at 80 registers on sm_80 and sm_120, in fp64 76
# bytes on gfx942; with 4 it takes 40 to 51 registers.
MIXTURE_LANE_BYTES = 16
# A softcap's tanh with fp64 or singly loaded columns takes more registers than the compilers like to give: for one more
# resident program ptxas spilled 8 to 44 bytes, LLVM 36 to 72. So does fp64 by itself in Triton 3.6: 8 bytes in
# row_gradient on sm_90 and in row_loss_and_gradient on sm_120. Allowed all registers, or two waves, none spills.
NARROW_VECTOR = 2
ROOM_ON_NVIDIA, ROOM_ON_AMD = {"maxnreg": 255}, {"waves_per_eu": 2}
# The interpreter takes a numpy call per operation and tile, whatever the tile's size; small ones, so that the small
# vocabularies of the tests have several, and a ragged end.
INTERPRETED_COLUMNS, INTERPRETED_LANES = 1024, 128
# A row's parts are merged as lanes of one warp, two each.
MOST_PARTS = 64
# Programs per multiprocessor that a split row is spread over.
RESIDENT = 4


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def widest_vector(itemsize: int, processor: Processor) -> int:
    """How many neighbours of the widest dtype, of ``itemsize`` bytes, a thread loads at once from aligned rows."""
    return INTERPRETED_COLUMNS // INTERPRETED_LANES // 2 if processor.interpreted else LOAD_BYTES // itemsize


def tile_of(vector: int, demanding: bool, lane_columns: int, processor: Processor) -> Tile:
    """The tile of rows that can be loaded ``vector`` neighbours at a time: 1 where rows begin anywhere, so that
    neighbouring threads load neighbouring columns.

    ``demanding``: a softcap, or fp64. ``lane_columns``: per thread and tile, if a load has no more.
    """
    if processor.interpreted:
        return Tile(INTERPRETED_COLUMNS // (INTERPRETED_LANES * vector), INTERPRETED_LANES, vector, 1, {})
    room = ROOM_ON_AMD if processor.amd else ROOM_ON_NVIDIA
    crowded = vector <= NARROW_VECTOR or vector > lane_columns
    options = room if demanding and crowded else {}
    return Tile(max(lane_columns // vector, 1), LANES, vector, LANES // processor.warp_size, options)


def parts_of_a_row(n: int, vocab_size: int, tile: Tile, processor: Processor) -> int:
    """How many parts a row is split into: 1, unless half the multiprocessors would be idle; then as many as the device
    has room for, of equal size."""
    if n == 0 or 2 * n >= processor.multiprocessors:
        return 1
    tiles = -(-vocab_size // tile.columns)
    most = min(RESIDENT * processor.multiprocessors // n, MOST_PARTS)
    tiles_of_a_part = -(-tiles // most)
    return -(-tiles // tiles_of_a_part)
