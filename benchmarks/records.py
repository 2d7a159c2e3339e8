"""A line of the CSV: one implementation on one case, with every single time, or with the reason why there is none."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .measure import MIB, Sample


@dataclass(frozen=True)
class Record:
    """What is known of one measurement; None where it was not measured.

    Args:
        group, case, implementation: what this is.
        objective: what the implementation computes.
        version: of its package.
        tokens, vocab, student_dim, teacher_dim, dtype: of the problem; 0 where logits come in.
        scale: how the problem is smaller than the one it stands for.
        seconds: of loss and gradients, each round.
        peak_bytes: beyond the inputs; gradients included.
        gradient_bytes: of the gradients that are handed out.
        divergence: the truth's mean reverse KL over the first ``error_tokens`` tokens, nats.
        loss_error, student_error, weight_error: see :class:`benchmarks.truth.Errors`.
        failure: why nothing was measured, or "".
        date, load: when, and the system's load average before the case.
    """

    group: str
    case: str
    implementation: str
    objective: str
    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int
    dtype: str
    scale: str
    version: str = ""
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    gradient_bytes: int = 0
    error_tokens: int = 0
    divergence: float | None = None
    loss_error: float | None = None
    student_error: float | None = None
    weight_error: float | None = None
    failure: str = ""
    date: str = ""
    load: float = 0.0

    @property
    def time(self) -> Sample | None:
        return Sample(self.seconds, "s") if self.seconds else None

    @property
    def memory(self) -> Sample | None:
        """Beyond inputs and gradients. What a step handed back to the system meanwhile may make it negative: 0 then."""
        if self.peak_bytes is None:
            return None
        return Sample((max(0, self.peak_bytes - self.gradient_bytes) / MIB,), "MiB")


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to the file, which is begun where there is none."""
    begun = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
        if not begun:
            writer.writeheader()
        for record in records:
            writer.writerow({**asdict(record), "seconds": " ".join(f"{s:.6g}" for s in record.seconds)})


def read(path: Path) -> list[Record]:
    """The lines of a file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [of_line(line) for line in csv.DictReader(file)]


def of_line(line: Mapping[str, str]) -> Record:
    values: dict[str, Any] = dict(line)
    values["seconds"] = tuple(float(s) for s in line["seconds"].split())
    for field in fields(Record):
        if field.type in ("int", "float"):
            values[field.name] = {"int": int, "float": float}[str(field.type)](line[field.name])
        elif field.type in ("int | None", "float | None"):
            number = int if str(field.type).startswith("int") else float
            values[field.name] = number(line[field.name]) if line[field.name] else None
    return Record(**values)


def write_facts(path: Path, facts: Mapping[str, str]) -> None:
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def read_facts(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}
