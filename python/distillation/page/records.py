"""A run folder's files, as far as they are there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
FILES = {
    "config.json": "the options and versions are not known",
    "metrics.jsonl": "there are no curves",
    "completions.jsonl": "there are no sampled completions",
    "histograms.jsonl": "there are no entropy histograms",
    "results.json": "the run has not been evaluated: it was interrupted or is still going",
}


@dataclass(frozen=True)
class Records:
    """What a run has written; empty where a file is not there yet."""

    config: Record
    metrics: dict[str, list[Record]]  # by run, in the order of the steps
    completions: dict[str, list[Record]]
    histograms: dict[str, list[Record]]
    evaluations: dict[str, list[Record]]  # in training, if that was asked for
    results: Record
    problems: list[str]  # what is missing or cannot be read, a sentence each

    @property
    def trained_on(self) -> str:
        """Whose completions a step learns from, with an article."""
        if self.config.get("completion_column"):
            return "the given completions"
        share = self.config.get("off_policy_fraction")
        if isinstance(share, (int, float)) and share > 0:
            return f"the completions of a step, {100 * share:.3g} % of them the teacher's"
        return "the student's own samples"

    @property
    def tau(self) -> float | None:
        """The gate's threshold in nats, from the results or the options."""
        tau = self.results.get("tau", self.config.get("tau"))
        return float(tau) if isinstance(tau, (int, float)) else None


def read_records(folder: Path) -> Records:
    """Everything in ``folder`` that can be read.

    Raises:
        FileNotFoundError: there is no such folder, or none of a run's files is in it.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise FileNotFoundError(f"{str(folder)!r} holds none of a run's files: {', '.join(FILES)}")
    problems = [f"{name} is missing: {lost}." for name, lost in FILES.items() if not (folder / name).is_file()]
    return Records(
        read_object(folder / "config.json", problems),
        by_run(read_lines(folder / "metrics.jsonl", problems), once=True),
        by_run(read_lines(folder / "completions.jsonl", problems)),
        by_run(read_lines(folder / "histograms.jsonl", problems), once=True),
        by_run(read_lines(folder / "evaluations.jsonl", problems)),
        read_object(folder / "results.json", problems),
        problems,
    )


def read_object(path: Path, problems: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        problems.append(f"{path.name} cannot be read: {error}.")
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path, problems: list[str]) -> list[Record]:
    """The objects of a file of JSON lines. A process that was killed leaves half a line behind."""
    if not path.is_file():
        return []
    records, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                unreadable += 1
    if unreadable:
        problems.append(f"{path.name} has {unreadable} unreadable line{'s' * (unreadable > 1)}, left out here.")
    return records


def by_run(records: list[Record], once: bool = False) -> dict[str, list[Record]]:
    """Records by run, sorted by step; with ``once`` the last of each step: a resumed run may have logged it twice."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(str(record.get("run", "run")), []).append(record)
    for name, mine in runs.items():
        last = list({record.get("step"): record for record in mine}.values()) if once else mine
        runs[name] = sorted(last, key=lambda record: number(record, "step"))
    return runs


def number(record: Record, name: str) -> float:
    """NaN where there is no such number."""
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def column(records: list[Record], name: str) -> list[float]:
    return [number(record, name) for record in records]
