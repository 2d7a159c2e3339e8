"""The table of every size from results.csv, and what ours has to reach in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..contenders import GPU_GROUPS, LIGER, OURS, PLAIN
from ..machine import gpu_facts
from ..matrix import acceptance
from ..page import block
from ..records import Case, read
from ..tables import case_table
from .step import DEVICE, OUT, REHEARSED, SHAPES, conclude, report
from .table import Measured

# dX in bf16: the block of gradients is rounded once, the result once more.
MOST_ERROR = 3 * 2**-8
# How many times as fast as these the first of ours has to be: on the first size, and on the others.
FASTER, NO_SLOWER = {PLAIN: 3.0, LIGER: 1.3}, {PLAIN: 1.0}


def main() -> int:
    cases = acceptance([contender for group in GPU_GROUPS.values() for contender in group], SHAPES, DEVICE)
    lines = {(line.case, line.implementation): line for line in read(OUT / "results.csv", Measured)}  # the last of each
    report("# Acceptance on a GPU", block(gpu_facts(), []))
    failed, words = [], []
    for case in cases:
        found = {c.name: line for c in case.contenders if (line := lines.get((case.name, c.name)))}
        ran = {name: line for name, line in found.items() if line.time}
        host = ", ".join(f"{name} {1e3 * line.host_seconds:.2f} ms" for name, line in ran.items())
        words.append(", ".join(f"{name} {1e3 * line.time.median:.1f}" for name, line in ran.items()))
        report(f"## {case.name}", case_table(list(found.values())), f"The host alone: {host}.")
        failed += checks(case, found, {} if REHEARSED else FASTER if case is cases[0] else NO_SLOWER)
    return conclude(failed, f"ms on {cases[0].name}: {words[0]}")


def checks(case: Case, found: Mapping[str, Measured], faster: Mapping[str, float]) -> list[str]:
    """Returns where ours did not run, or is not as exact or as fast as it must be. A peer may fail."""
    failed, times = [], {name: line.time.median for name, line in found.items() if line.time}
    ours = [contender.name for contender in case.contenders if contender.name.startswith(OURS)]
    for name in ours:
        line, title = found.get(name), f"{name}, {case.name}"
        if line is None or line.failure:
            failed.append(f"{title}: {'was not run' if line is None else line.failure}")
        elif line.student_error is None or not line.student_error <= MOST_ERROR:
            failed.append(f"{title}: dX is off by {line.student_error}, at most {MOST_ERROR:.4f}")
    for peer, least in faster.items():
        if ours[0] in times and peer in times and (ratio := times[peer] / times[ours[0]]) < least:
            failed.append(f"{case.name}: {ratio:.2f}x as fast as {peer}, at least {least:g}x")
    return failed


if __name__ == "__main__":
    sys.exit(main())
