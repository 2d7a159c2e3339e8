"""``python -m benchmarks.cuda``: who holds what on each GPU, the bytes counted in emulation, and a roofline.

Needs a C++ compiler, and neither a GPU nor nvcc.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..page import replace_block
from . import emulation, occupancy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated blocks of this page")
    arguments = parser.parse_args()
    missing = emulation.switch_on()
    if missing is not None:
        parser.exit(2, f"{missing}\n")
    from . import traffic

    blocks = {
        "occupancy": occupancy.occupancy_table(),
        "cuda traffic": traffic.table(),
        "roofline": occupancy.roofline_table(),
    }
    for name, table in blocks.items():
        print(table, end="\n\n")
        if arguments.write:
            replace_block(arguments.write, name, table)


if __name__ == "__main__":
    main()
