"""``python -m benchmarks.ratios``: every target of the project beside what is reached, as one Markdown table."""

from __future__ import annotations

from dataclasses import replace

from .cases import CASES, PUBLISHED, QUICK
from .cli import parse, publish
from .measure import progress
from .page import replace_block
from .results import Row, bound_table, ratio_table, summary_table

MODULE = "benchmarks.ratios"


def main() -> None:
    arguments = parse(MODULE, "The ratios that the project is held to.", list(CASES), front_page=True)
    scale = QUICK if arguments.quick else PUBLISHED
    if arguments.seconds is not None:
        scale = replace(scale, seconds=arguments.seconds)
    rows: list[Row] = []
    for name in arguments.only or CASES:
        progress(f"{name}:")
        rows += CASES[name](scale)
    bounded = [row for row in rows if row.target is None]
    parts = [ratio_table(row for row in rows if row.target is not None)]
    if bounded:
        parts += ["What bounds them:", bound_table(bounded)]
    publish(MODULE, "ratios", arguments, parts, [row.record() for row in rows])
    if arguments.summary:
        replace_block(arguments.summary, "figures", summary_table(rows))


if __name__ == "__main__":
    main()
