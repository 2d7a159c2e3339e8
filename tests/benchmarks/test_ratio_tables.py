"""The command runs and prints a well-formed table; targets and generated blocks do what the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cli import parse
from benchmarks.machine import ENVIRONMENTS
from benchmarks.measure import Sample
from benchmarks.page import replace_block
from benchmarks.results import HEADER, Row, Target, compared, ratio_table

ROOT = Path(__file__).resolve().parents[2]


def tables_of(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text: their lines' cells."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in blocks]


def test_a_quick_run_prints_a_table(tmp_path: Path) -> None:
    record = tmp_path / "ratios.json"
    options = ["--quick", "--only", "add", "--seconds", "0", "--json", str(record)]
    command = [sys.executable, "-m", "benchmarks.ratios", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "not the published figures" in done.stdout and "python -m benchmarks.ratios" in done.stdout
    (header, *_), *_ = tables = tables_of(done.stdout)
    assert header == list(HEADER)
    assert [len(table) for table in tables] == [2 + 3, 2 + 3]
    assert all(len(line) == len(table[0]) for table in tables for line in table)
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == 6 and all(row["ours"]["values"] for row in rows)


@pytest.mark.parametrize("partial", [["--quick"], ["--only", "add"]])
def test_a_page_is_written_by_whole_runs_only(partial: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ratios", *partial, "--write", "page.md"])
    with pytest.raises(SystemExit):
        parse("benchmarks.ratios", "", ["add"])


def test_a_capability_restarts_the_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: started.append((command, environment)))
    monkeypatch.setattr(sys, "argv", ["ratios", "--capability", "avx2"])
    parse("benchmarks.ratios", "", ["add"])
    (command, environment), *others = started
    assert command[1:] == ["-m", "benchmarks.ratios", "--capability", "avx2"] and not others
    assert environment.items() >= ENVIRONMENTS["avx2"].items()

    for name, value in ENVIRONMENTS["avx2"].items():
        monkeypatch.setenv(name, value)
    parse("benchmarks.ratios", "", ["add"])
    assert len(started) == 1


@pytest.mark.parametrize(
    ("target", "reached", "met"),
    [
        (Target("faster", 25), 25.0, True),
        (Target("faster", 25), 24.9, False),
        (Target("its time", 1.8), 1.8, True),
        (Target("its time", 1.8), 1.81, False),
        (Target("MiB", 160), 161.0, False),
    ],
)
def test_targets(target: Target, reached: float, met: bool) -> None:
    sample = Sample((reached,), "x")
    assert Row("case", "peer", target, sample, sample).met is met


def test_the_ratio_points_where_the_target_does() -> None:
    ours, peer = Sample((1.0,), "s"), Sample((4.0,), "s")
    assert compared("c", "p", Target("faster", 2), ours, peer).reached.median == 4
    assert compared("c", "p", Target("its time", 2), ours, peer).reached.median == 0.25
    assert "| **no** |" in ratio_table([compared("c", "p", Target("faster", 5), ours, peer)])


def test_a_generated_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin a -->\nold\n<!-- end a -->\nbelow\n<!-- begin b -->\nkept\n<!-- end b -->\n")
    replace_block(page, "a", "new")
    assert page.read_text() == (
        "above\n<!-- begin a -->\n\nnew\n\n<!-- end a -->\nbelow\n<!-- begin b -->\nkept\n<!-- end b -->\n"
    )
    with pytest.raises(ValueError, match="begin c"):
        replace_block(page, "c", "new")
