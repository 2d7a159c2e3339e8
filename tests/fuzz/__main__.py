"""``python -m tests.fuzz --seed 123`` or ``--seeds 0:20000``: random calls against the reference, failures by seed."""

from __future__ import annotations

import argparse
import time

import torch

from tests.fuzz.calls import draw
from tests.fuzz.compare import check


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="replay this one, and print the call")
    which.add_argument("--seeds", help="first:last, without the last")
    parser.add_argument("--backend", help="instead of the call's own: triton and cuda are interpreted and emulated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
        print(draw(options.seed))
    else:
        seeds = range(*(int(part) for part in options.seeds.split(":")))
    begin, failed = time.monotonic(), 0
    for seed in seeds:
        call = draw(seed)
        if options.backend is not None:
            call.options["backend"] = options.backend
        wrong = check(call)
        if wrong:
            failed += 1
            print(call, *(f"    {line}" for line in wrong), sep="\n", flush=True)
    print(f"{len(seeds)} calls in {time.monotonic() - begin:.0f} s, {failed} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
