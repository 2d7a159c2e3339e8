"""Cases, and the records that measuring them gives, in memory and in a CSV file."""

from __future__ import annotations

import csv
import datetime
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from eopd_kernels.testing.processes import MIB

from .contenders import Contender
from .measure import Sample
from .problems import LogitsProblem, Shape


@dataclass(frozen=True)
class Record:
    """A line of the CSV: one contender on one case. What was not measured is None, or empty."""

    group: str
    case: str
    implementation: str  # the contender's name
    objective: str
    tokens: int
    vocab: int
    student_dim: int  # both dims are 0 where logits come in
    teacher_dim: int
    dtype: str
    scale: str  # how the problem is smaller than the one it stands for
    version: str = ""  # of the contender's package
    seconds: tuple[float, ...] = ()  # of loss and gradients, each round
    peak_bytes: int | None = None  # beyond the inputs; gradients included
    gradient_bytes: int = 0  # of the gradients that are handed out
    error_tokens: int = 0  # how many tokens, the first ones, were compared with the truth
    divergence: float | None = None  # the truth's mean reverse KL over these tokens, nats
    loss_error: float | None = None  # see benchmarks.truth.Errors
    student_error: float | None = None
    weight_error: float | None = None
    failure: str = ""  # why nothing was measured
    date: str = ""
    load: float = 0.0  # the system's load average before the case

    @property
    def time(self) -> Sample | None:
        return Sample(self.seconds, "s") if self.seconds else None

    @property
    def memory(self) -> Sample | None:
        """Memory beyond inputs and gradients, 0 where the step handed more than that back to the system meanwhile."""
        if self.peak_bytes is None:
            return None
        return Sample((max(0, self.peak_bytes - self.gradient_bytes) / MIB,), "MiB")


@dataclass(frozen=True)
class Case:
    """A problem, and the contenders that are measured on it."""

    group: str  # group and name: where its lines stand in the tables
    name: str
    source: Callable[[], LogitsProblem]  # makes the problem, in a process of its own
    contenders: tuple[Contender, ...]  # in the order of their turns
    shape: Shape
    dtype: str = "fp32"
    scale: str = ""  # how the problem is smaller than the one it stands for
    error_tokens: int = 128  # how many tokens, the first ones, are compared with the truth; 0: none
    seconds: float = 10.0  # seconds and patience: see benchmarks.measure.rounds
    patience: float = 60.0
    limit: float = 300.0  # seconds that a single answer of a worker may take

    @property
    def cost(self) -> float:
        """An estimate of the seconds it takes on two cores: starting processes, their first steps, and the rounds."""
        flops = 2 * self.shape.tokens * self.shape.vocab * (3 * self.shape.student_dim + self.shape.teacher_dim)
        step = 0.1 + flops / 8e10
        turns = step * len(self.contenders)
        return 5 + 4 * len(self.contenders) + 2 * turns + min(max(3 * turns, self.seconds), self.patience + turns)

    def record(self, contender: Contender) -> Record:
        """Returns the line of a contender as it is before anything is measured."""
        return Record(
            group=self.group,
            case=self.name,
            implementation=contender.name,
            objective=contender.objective,
            **asdict(self.shape),
            dtype=self.dtype,
            scale=self.scale,
            version=contender.version or "",
            date=datetime.date.today().isoformat(),
            load=round(os.getloadavg()[0], 2),
        )


# From the text of a cell to the value, by the type of the field.
PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
    "tuple[float, ...]": lambda text: tuple(map(float, text.split())),
}


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to the file, which is begun where there is none."""
    begun, records = path.exists(), list(records)
    with path.open("a", newline="") as file:
        names = [f.name for f in fields(records[0] if records else Record)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if not begun:
            writer.writeheader()
        for record in records:
            writer.writerow({**asdict(record), "seconds": " ".join(f"{s:.6g}" for s in record.seconds)})


def read(path: Path, kind: type[Any] = Record) -> list[Any]:
    """Reads the lines of a file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            kind(**{field.name: PARSERS[str(field.type)](line[field.name]) for field in fields(kind)})
            for line in csv.DictReader(file)
        ]


def write_facts(path: Path, facts: Mapping[str, str]) -> None:
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def read_facts(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}
