"""The command ``python -m eopd_kernels.info``, with ``--check`` for the self-test."""

from __future__ import annotations

import argparse
import sys

from . import lines
from .check import check


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eopd_kernels.info", description="The backends of this installation."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="then run each backend that is available, against fp64 and beside plain PyTorch, in less than a minute; "
        "status 1 where one is wrong",
    )
    checked = parser.parse_args().check
    print("\n".join(lines()), flush=True)
    if not checked:
        return 0
    print()
    passed = True
    for line, right in check():
        print(line, flush=True)
        passed &= right
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
