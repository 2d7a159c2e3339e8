"""One folder: report.md to read, results.csv to compute with, checks.csv, environment.txt, and the tests' own log."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from ..page import block
from ..results import markdown_table
from .cell import Cell
from .checks import Check
from .matrix import Size

RESULTS = (
    *("contender", "tokens", "vocab", "student_dim", "teacher_dim"),
    *("median_ms", "min_ms", "max_ms", "peak_mib", "dx_error", "failure"),
)


def write(folder: Path, facts: Mapping[str, str], cells: Sequence[Cell], checks: Sequence[Check]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(page(facts, cells, checks))
    (folder / "environment.txt").write_text(environment())
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(RESULTS)
        writer.writerows(record(cell) for cell in cells)
    with (folder / "checks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Check)])
        writer.writerows(astuple(check) for check in checks)


def record(cell: Cell) -> list[object]:
    times = [1e3 * s for s in cell.seconds]
    summary = (statistics.median(times), min(times), max(times)) if times else ("", "", "")
    return [cell.contender, *astuple(cell.size), *summary, cell.peak / 2**20, cell.error, cell.failure or ""]


def page(facts: Mapping[str, str], cells: Sequence[Cell], checks: Sequence[Check]) -> str:
    failed = [check for check in checks if not check.passed]
    verdict = f"**{len(failed)} of {len(checks)} checks failed.**" if failed else f"All {len(checks)} checks passed."
    parts = ["# Acceptance on a GPU", block(facts, [verdict])]
    if failed:
        parts.append(markdown_table(("failed", "detail"), [[c.name, c.detail] for c in failed]))
    for size in dict.fromkeys(cell.size for cell in cells):
        parts += [f"## {size}", table(size, [cell for cell in cells if cell.size == size])]
    return "\n\n".join(parts) + "\n"


def table(size: Size, cells: Sequence[Cell]) -> str:
    """Loss and gradients, bf16; ratios against the first contender that ran, which is ours."""
    base = next((statistics.median(cell.seconds) for cell in cells if cell.failure is None), None)
    rows = []
    for cell in cells:
        if cell.failure is not None or base is None:
            rows.append([cell.contender, cell.failure or "–", *["–"] * 4])
            continue
        median = statistics.median(cell.seconds)
        spread = f"{1e3 * median:.2f} ({1e3 * min(cell.seconds):.2f}–{1e3 * max(cell.seconds):.2f})"
        error = "–" if cell.error is None else f"{cell.error:.1e}"
        tokens = f"{size.tokens / median:,.0f}"
        rows.append([cell.contender, spread, f"{median / base:.2f}", tokens, f"{cell.peak / 2**20:,.0f}", error])
    header = ("what", "ms, median (min–max)", "time / ours", "tokens/s", "peak MiB beyond inputs", "error of dX")
    return markdown_table(header, rows)


def environment() -> str:
    """What was installed."""
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=False)
    return frozen.stdout or frozen.stderr
