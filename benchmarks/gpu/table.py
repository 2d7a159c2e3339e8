"""``python -m benchmarks.gpu.table GROUP``: time, memory and error of contenders on each size, into results.csv."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass, replace

from ..contenders import GPU_GROUPS, Contender
from ..matrix import acceptance
from ..problems import LogitsProblem
from ..records import Case, Record, append
from ..truth import largest_error, truth
from ..worker import reason
from .step import DEVICE, METER, OUT, REHEARSED, SHAPES, conclude, gpu

WARM_UPS, ROUNDS = (1, 1) if REHEARSED else (2, 9)


@dataclass(frozen=True)
class Measured(Record):
    """A line with the seconds that the host takes to hand a step to an idle device."""

    host_seconds: float | None = None


def main(group: str) -> int:
    found = []
    for case in acceptance(GPU_GROUPS[group], SHAPES, DEVICE):
        problem = case.source()
        for contender in case.contenders:
            found.append(measured(contender, case, problem))
            append(OUT / "results.csv", found[-1:])
            print(f"{contender.name}, {case.name}: {found[-1].failure or found[-1].time}", flush=True)
    failures = {line.implementation: line.failure for line in found if line.failure}
    cells = f"{sum(not line.failure for line in found)} of {len(found)} cells were measured"
    return conclude([], "; ".join([cells, *(f"{name}: {why}" for name, why in failures.items())]))


def measured(contender: Contender, case: Case, problem: LogitsProblem) -> Measured:
    """Measures the error of dX, memory and times. What fails becomes part of the line."""
    line = Measured(**asdict(case.record(contender)))
    if why := contender.refusal(DEVICE):
        return replace(line, failure=why)
    try:
        step = contender.step(problem)
        for _ in range(WARM_UPS):
            gradients = step()  # compiles, the first time
        assert isinstance(gradients, list)
        exact = truth(problem.first(case.error_tokens), contender.objective, of_head=False).gradients[0]
        few = gradients[0][: len(exact)].double() * (len(problem.student) / len(exact))
        line = replace(line, error_tokens=len(exact), student_error=largest_error(few, exact))
        line = replace(line, gradient_bytes=sum(gradient.nbytes for gradient in gradients))
        del gradients, few, exact
        peak = METER.peak_bytes(step)
        host = statistics.median(METER.host_seconds(step) for _ in range(WARM_UPS))
        seconds = tuple(METER.seconds(step) for _ in range(ROUNDS))
        return replace(line, peak_bytes=peak, host_seconds=host, seconds=seconds)
    except Exception as error:  # a peer may fail in any way, and what failed is part of the report
        return replace(line, student_error=None, failure=reason(error))


if __name__ == "__main__":
    with gpu():
        sys.exit(main(sys.argv[1]))
