"""``python -m benchmarks``, or ``make bench``: time, memory and error of the loss beside every peer that is installed.

Each measurement has a process of its own; the lines of a case are kept as soon as it is done, and a run that was broken
off goes on where it stopped. ``--quick`` takes three minutes and shows that it works, ``--full`` more than an hour.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .machine import ENVIRONMENTS, command, description, imitate, others_running
from .matrix import GROUPS, LEVELS, cases
from .measure import progress
from .records import Case, append, read, read_facts, write_facts
from .report import report
from .run import run
from .tables import case_table

MODULE = "benchmarks"


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 2
    if arguments.capability:
        imitate(arguments.capability, MODULE)
    level = "quick" if arguments.quick else "full" if arguments.full else "usual"
    stem = f"{arguments.device}-{arguments.capability}" if arguments.capability else arguments.device
    file, facts_file = arguments.out / f"{stem}.csv", arguments.out / f"{stem}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        forget(file, arguments.only)
    if file.exists() and (begun := read_facts(facts_file).get("level")) != level:
        print(f"{file} has a run of level {begun!r}: give another --out, or --again to begin anew", file=sys.stderr)
        return 2
    if not file.exists():
        facts = description(MODULE, arguments.capability, others_running(), arguments.device)
        # One file has the groups of any number of runs: the command is that of all of them.
        facts["command"] = f"`{command(MODULE, without=['--only'])}`"
        write_facts(facts_file, {**facts, "level": level})
    wanted = [
        case for case in cases(LEVELS[level], arguments.device) if not arguments.only or case.group in arguments.only
    ]
    memory = None if arguments.memory is None else int(arguments.memory * 2**30)
    measure(wanted, arguments.device, file, memory)
    draw(file, stem)
    page = file.with_suffix(".md")
    page.write_text(report(arguments.out, stem, ".") + "\n")
    print(f"{page}, {file}")
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small problems, three minutes; not the published figures")
    size.add_argument("--full", action="store_true", help="the published figures: larger problems, more rounds")
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-report"), metavar="FOLDER", help="default: bench-report"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what FOLDER has of these groups")
    parser.add_argument("--capability", choices=list(ENVIRONMENTS), help="keep torch and eopd_kernels to these vectors")
    parser.add_argument("--memory", type=float, metavar="GIB", help="what one process may allocate; default: 3/4")
    arguments = parser.parse_args(words)
    if arguments.capability and arguments.device != "cpu":
        parser.error("--capability is of a CPU: leave out --device cuda")
    return arguments


def measure(wanted: Sequence[Case], device: str, file: Path, memory: int | None) -> None:
    """Runs the cases that the file does not have yet, and adds their lines case by case."""
    done = {(record.group, record.case) for record in read(file)}
    left = [case for case in wanted if (case.group, case.name) not in done]
    if len(left) < len(wanted):
        progress(f"{len(wanted) - len(left)} of {len(wanted)} cases are in {file} already")
    log = file.with_suffix(".log").resolve()
    begin, expected = time.monotonic(), 0.0
    for number, case in enumerate(left):
        elapsed = time.monotonic() - begin
        # The estimate is corrected by how the cases so far have gone.
        pace = elapsed / expected if expected else 1.0
        rest = pace * sum(c.cost for c in left[number:])
        progress(f"[{number + 1}/{len(left)}] {case.group}: {case.name} ({clock(elapsed)}, about {clock(rest)} to go)")
        records = run(case, device, log, memory)
        append(file, records)
        expected += case.cost
        print(f"\n{case.group}: {case.name}\n\n{case_table(records)}\n", flush=True)


def forget(file: Path, groups: Sequence[str] | None) -> None:
    """Removes the lines of these groups from the file; None: all."""
    kept = [record for record in read(file) if groups and record.group not in groups]
    file.unlink(missing_ok=True)
    if kept:
        append(file, kept)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def draw(file: Path, stem: str) -> None:
    """Draws the plots, where matplotlib is installed."""
    try:
        from . import plots
    except ImportError as missing:
        progress(f"no plots: {missing}")
    else:
        plots.draw(read(file), file.parent, stem)


if __name__ == "__main__":
    sys.exit(main())
