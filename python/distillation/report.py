"""What a run says on the terminal."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from typing import Any

import torch
from tqdm import tqdm

# Column heading, metric and format of the lines printed during training.
STEP_COLUMNS = (
    ("step", "step", "4d"),
    ("loss", "loss", "7.4f"),
    ("rev KL", "reverse_kl", "7.4f"),
    ("fwd KL", "forward_kl", "7.4f"),
    ("H_t", "teacher_entropy", "5.2f"),
    ("H_s", "student_entropy", "5.2f"),
    ("gate", "gate_fraction", "4.0%"),
    ("length", "completion_length", "6.1f"),
    ("tok/s", "tokens_per_second", "7.0f"),
    ("MiB", "peak_memory_mib", "6.0f"),
)


def say(text: str = "") -> None:
    """A line on standard output, of the first process only, that does not tear a progress bar apart."""
    if int(os.environ.get("RANK", "0")):
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def warn(text: str) -> None:
    """A warning on standard error, of the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"distill.py: warning: {text}", file=sys.stderr)


def shown(step: int, steps: int, lines: int = 5) -> bool:
    """Whether this step is among the ``lines`` or so that are printed: the first, the last and evenly in between."""
    return step in (1, steps) or step * lines // steps > (step - 1) * lines // steps


def step_header() -> str:
    return "  " + "  ".join(heading.rjust(width(heading, form)) for heading, _, form in STEP_COLUMNS)


def step_line(metrics: dict[str, Any]) -> str:
    return "  " + "  ".join(
        ("-" if metrics[name] is None else format(metrics[name], form)).rjust(width(heading, form))
        for heading, name, form in STEP_COLUMNS
    )


def width(heading: str, form: str) -> int:
    return max(len(heading), int(form.split(".")[0].rstrip("d")))


def table(rows: list[tuple[str, dict[str, float]]], columns: list[tuple[str, str, str]]) -> str:
    """Rows of (name, numbers) under ``columns`` of (heading, number, format); '-' where a number is missing or nan."""
    first = max(len(name) for name, _ in rows)
    lines = ["  " + "".ljust(first) + "".join(heading.rjust(len(heading) + 3) for heading, _, _ in columns)]
    for name, numbers in rows:
        cells = ""
        for heading, key, form in columns:
            value = numbers.get(key, math.nan)
            cells += ("-" if math.isnan(value) else format(value, form)).rjust(len(heading) + 3)
        lines.append("  " + name.ljust(first) + cells)
    return "\n".join(lines)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far, MiB: tensors on a CUDA device, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10
