"""How a row is cut: a table with its reasons, so that no first call has to search. Knows neither torch nor Triton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Options(NamedTuple):
    """What a kernel is compiled for, beside dtypes and alignment.

    A lane is a thread. A program takes ``steps`` tiles ``[lanes, width]`` at a time, a group of ``columns``, of which a
    thread loads ``vector`` neighbours at once. (Triton reads the fields of a constant tuple, and no properties.)
    """

    vector: int
    width: int
    lanes: int
    steps: int
    tile: int  # columns of a tile
    columns: int
    student_softcap: bool
    teacher_softcap: bool
    forward_plain: bool = True  # of skewed divergences: whether this half has no skew
    reverse_plain: bool = True


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
# Columns per thread and group. row_loss_and_gradient, fp32, sm_90, registers and instructions per column of both loops:
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
# vocabularies of the tests have several groups, and a ragged end.
INTERPRETED_LANES, INTERPRETED_VECTOR = 128, 4
# Triton's default until 3.9, and off after it. A multiply and an add in one halve the loops' arithmetic.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
# A row's parts are merged as lanes of one warp, two each.
MOST_PARTS = 64
# Programs per multiprocessor that a split row is spread over.
RESIDENT = 4


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def widest_vector(itemsize: int, processor: Processor) -> int:
    """How many neighbours of the widest dtype, of ``itemsize`` bytes, a thread loads at once from aligned rows."""
    return INTERPRETED_VECTOR if processor.interpreted else LOAD_BYTES // itemsize


def options_of(vector: int, softcaps: Sequence[bool], lane_columns: int, processor: Processor) -> Options:
    """The options for rows that can be loaded ``vector`` neighbours at a time: 1 where rows begin anywhere, so that
    neighbouring threads load neighbouring columns.

    ``lane_columns``: per thread and group of tiles, if a load has no more.
    """
    width = vector if vector > 1 else lane_columns
    lanes, steps = INTERPRETED_LANES if processor.interpreted else LANES, max(lane_columns // width, 1)
    return Options(vector, width, lanes, steps, lanes * width, lanes * width * steps, *softcaps)


def compiler_options(options: Options, fp64: bool, lane_columns: int, processor: Processor) -> dict[str, Any]:
    """What the compiler is told beside."""
    demanding = fp64 or options.student_softcap or options.teacher_softcap
    crowded = options.vector <= NARROW_VECTOR or options.vector > lane_columns
    room = ROOM_ON_AMD if processor.amd else ROOM_ON_NVIDIA
    return {"num_warps": LANES // processor.warp_size, **FUSED_MULTIPLY_ADD, **(room if demanding and crowded else {})}


def parts_of_a_row(n: int, vocab_size: int, columns: int, processor: Processor) -> int:
    """How many parts a row is split into, visited ``columns`` at a time: 1, unless half the multiprocessors would be
    idle; then as many as the device has room for, of equal size."""
    if n == 0 or 2 * n >= processor.multiprocessors:
        return 1
    groups = -(-vocab_size // columns)
    most = min(RESIDENT * processor.multiprocessors // n, MOST_PARTS)
    groups_of_a_part = -(-groups // most)
    return -(-groups // groups_of_a_part)
