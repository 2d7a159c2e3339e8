"""``python -m benchmarks.workspace``: time and memory under budgets for the blocks of logits.

The default of ``workspace_bytes`` is chosen from its tables.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from eopd_kernels.testing.processes import MIB

from .contenders import HIDDEN, UNCHUNKED, Contender, ours
from .machine import ENVIRONMENTS, description, imitate, others_running
from .measure import progress
from .page import QUICK_LABEL, block, markdown_table, replace_block
from .problems import Shape, hidden_problem
from .records import Case
from .run import run
from .steps import chunk_tokens

MODULE = "benchmarks.workspace"
BUDGETS = (32, 64, 96, 128, 192, 256)  # MiB
SHAPES = {"small": Shape(2_048, 49_152, 576, 576), "large": Shape(512, 151_936, 1_024, 1_024)}
QUICK_SHAPES = {"small": Shape(512, 8_192, 128, 128), "large": Shape(256, 16_384, 128, 128)}


def parse() -> argparse.Namespace:
    """Reads the options; with ``--capability`` the command continues in a new process that is restricted to it."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Time and memory by workspace budget.")
    parser.add_argument("--only", action="append", choices=SHAPES, metavar="CASE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, half a minute; not the published figures")
    parser.add_argument("--seconds", type=float, help="how long rounds are repeated in each case (at least 3 rounds)")
    parser.add_argument("--capability", choices=list(ENVIRONMENTS), help="keep torch and eopd_kernels to these vectors")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated block of this page")
    arguments = parser.parse_args()
    if arguments.write and (arguments.quick or arguments.only):
        parser.error("what is written is of whole runs only: leave out --quick and --only")
    if arguments.capability:
        imitate(arguments.capability, MODULE)
    return arguments


def main() -> None:
    arguments, others = parse(), others_running()
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    seconds = arguments.seconds if arguments.seconds is not None else 1 if arguments.quick else 90
    budgeted = [Contender(f"{b} MiB", "gated", partial(ours, workspace_bytes=b * MIB)) for b in BUDGETS]
    header = ("workspace_bytes", "tokens per chunk", "of the products' time", "time", "peak memory")
    parts = [QUICK_LABEL] if arguments.quick else []
    for name in arguments.only or shapes:
        shape = shapes[name]
        progress(f"{name}:")
        case = Case(
            "workspace",
            str(shape),
            partial(hidden_problem, shape),
            (HIDDEN[UNCHUNKED], *budgeted),
            shape,
            error_tokens=0,
            seconds=seconds,
        )
        products, *within = run(case)
        assert products.time is not None, products.failure
        rows, problem = [], hidden_problem(shape)
        for budget, record in zip(BUDGETS, within, strict=True):
            time, peak = record.time, record.memory
            assert time is not None and peak is not None, record.failure
            tokens = chunk_tokens(problem, budget * MIB)
            rows.append([f"{budget} MiB", str(tokens), str(time / products.time), str(time), str(peak)])
        parts += [f"{shape}; the four products over all tokens at once take {products.time}:"]
        parts += [markdown_table(header, rows)]
    text = block(description(MODULE, arguments.capability, others), parts)
    print(text)
    if arguments.write:
        replace_block(arguments.write, f"workspace {arguments.capability or ''}".strip(), text)


if __name__ == "__main__":
    main()
