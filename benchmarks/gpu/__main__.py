"""``python -m benchmarks.gpu``, or ``make gpu``: everything that wants a GPU, in eight minutes, into one folder.

It builds the CUDA kernels in place, with this Python and no network. Status 0: every required step ran and passed.
1: one did not. 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from eopd_kernels.testing import emulation, steps

from .plan import SECONDS, environment, stages


def main() -> int:
    begin, arguments = time.monotonic(), parse(sys.argv[1:])
    if not (torch.cuda.is_available() or arguments.rehearse):
        print("no GPU: nothing was run, nothing is claimed", file=sys.stderr)
        return 2
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.rehearse and (why := emulation.switch_on()):
        print(f"no emulated CUDA kernels: {why}")
    os.environ |= environment(folder, arguments.rehearse)
    chosen = [
        [step for step in stage if not arguments.only or step.name in arguments.only]
        for stage in stages(arguments.wheels, arguments.rehearse)
    ]
    outcomes = steps.run(chosen, SECONDS - (time.monotonic() - begin), folder / "log.txt")
    what = "a rehearsal on a CPU, no figure means anything" if arguments.rehearse else "acceptance on a GPU"
    text, status = steps.summary(outcomes, f"{what}, {time.monotonic() - begin:.0f} s; see {arguments.out}")
    with (folder / "summary.txt").open("a") as file:
        print(text, file=file)
    print(f"\n{text}")
    return status


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [step.name for stage in stages(Path()) for step in stage]
    default = Path(os.environ.get("OUT") or "gpu-report")
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER", help=f"is added to; default: {default}")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of peers, to be installed for this run")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU that stands in; no claims")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
