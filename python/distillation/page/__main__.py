"""``python -m distillation.page FOLDER``: writes the page of a run folder again, finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import write_page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distillation.page", description="Writes report.html into a run folder, from its files."
    )
    parser.add_argument("folder", type=Path, help="of a run, finished or interrupted")
    try:
        print(write_page(parser.parse_args(arguments).folder))
    except OSError as error:
        print(f"distillation.page: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
