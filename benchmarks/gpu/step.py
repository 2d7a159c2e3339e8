"""What the steps have in common: the sizes, where they report to, and what stands in for a GPU in a rehearsal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from eopd_kernels.testing import pretend

from ..matrix import GPU_SHAPES, TINY_SHAPES
from ..measure import CUDA, STAND_IN
from .plan import REHEARSAL

OUT = Path(os.environ.get("OUT") or "gpu-report")
REHEARSED = REHEARSAL in os.environ
DEVICE, METER, SHAPES = ("cpu", STAND_IN, TINY_SHAPES) if REHEARSED else ("cuda", CUDA, GPU_SHAPES)


def report(*parts: str) -> None:
    """Adds paragraphs to report.md."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "report.md").open("a") as file:
        file.write("\n\n".join(parts) + "\n\n")


def conclude(failed: Sequence[str], words: str) -> int:
    """Prints what failed and, as the last line, what is to be known of the step. Returns its status."""
    print(*failed, "; ".join([*failed[:2], words]), sep="\n")
    return 1 if failed else 0


def gpu() -> contextlib.AbstractContextManager[None]:
    """Where a step works: on the GPU, or on a CPU that pretends."""
    return pretend.gpu() if REHEARSED else contextlib.nullcontext()
