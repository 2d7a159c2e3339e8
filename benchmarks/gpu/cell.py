"""``python -m benchmarks.gpu.cell CONTENDER``: one contender on every size, in a process of its own.

A line of JSON per size, printed as soon as it is known, so that a contender that hangs or dies loses only what follows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import asdict, dataclass

import torch

from ..pretend import gpu
from ..problems import HiddenProblem
from . import truth
from .device import Device, device
from .matrix import SIZES, TINY, Contender, Size, contenders, problem

WARM_UPS, ROUNDS = 2, 7
MARK = "cell: "


@dataclass(frozen=True)
class Cell:
    """One measurement. ``failure`` says why there is none.

    Args:
        contender, size: of what.
        seconds: of loss and gradients, each round.
        peak: bytes beyond the inputs, gradients included.
        error: of dX against fp64, relative to its largest entry; None where no truth is known.
    """

    contender: str
    size: Size
    seconds: tuple[float, ...] = ()
    peak: int = 0
    error: float | None = None
    failure: str | None = None

    def line(self) -> str:
        return MARK + json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Cell:
        record = json.loads(line.removeprefix(MARK))
        return cls(**{**record, "size": Size(**record["size"]), "seconds": tuple(record["seconds"])})


def measured(contender: Contender, size: Size, on: Device) -> Cell:
    given = problem(size, on.device)

    def step() -> None:
        given.student.grad = given.student_weight.grad = None
        contender.loss(given).backward()

    try:
        for _ in range(WARM_UPS):
            step()
        assert given.student.grad is not None
        exact = truth.grad_hidden(given, contender.divergence)
        error = None if exact is None else truth.relative_error(given.student.grad, exact)
        del exact
        release(given)
        peak = on.peak_bytes(step)
        seconds = tuple(on.seconds(step) for _ in range(ROUNDS))
    except Exception as failed:  # a peer may fail in any way, and what failed is part of the report
        return Cell(
            contender.name, size, failure=f"{type(failed).__name__}: {str(failed).strip().splitlines()[0][:200]}"
        )
    return Cell(contender.name, size, seconds, peak, error)


def release(given: HiddenProblem) -> None:
    given.student.grad = given.student_weight.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cell", description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("--stand-in", action="store_true", help="tiny sizes on a CPU that stands in for the GPU")
    arguments = parser.parse_args()
    on = device(arguments.stand_in)
    with gpu() if arguments.stand_in else contextlib.nullcontext():
        (contender,) = (c for c in contenders(on.device) if c.name == arguments.contender)
        for size in TINY if arguments.stand_in else SIZES:
            print(measured(contender, size, on).line(), flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
