"""Runs steps after or beside one another, each a process under a time limit of its own, into one log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
# With this status ends what cannot run here; its last line says why.
MISSING = 77
GRACE = 5.0  # seconds from being asked to end to being ended
WIDTH = 240


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and whether the run passes all the same if it fails or cannot run."""

    name: str
    command: Sequence[str]
    limit: float
    may: Literal["be missing", "fail", None] = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: its status, and the last line that it printed or why there is none."""

    step: Step
    status: int
    seconds: float
    detail: str

    @property
    def fatal(self) -> bool:
        forgiven = self.step.may == "fail" or (self.step.may == "be missing" and self.status == MISSING)
        return self.status != 0 and not forgiven

    def __str__(self) -> str:
        verdict = {0: "passed", MISSING: "missing"}.get(self.status, "FAILED" if self.fatal else "failed")
        return f"{verdict:<8} {self.step.name:<10} {self.seconds:4.0f} s  {self.detail}"[:WIDTH]


def run(stages: Sequence[Sequence[Step]], seconds: float, log: Path) -> list[Outcome]:
    """Runs stage after stage, the steps of each side by side, all of them within ``seconds``."""
    end, outcomes = time.monotonic() + seconds, []
    for stage in stages:
        with ThreadPoolExecutor(max(1, len(stage))) as pool:
            for outcome in pool.map(partial(run_one, end=end, log=log), stage):
                print(outcome, flush=True)
                outcomes.append(outcome)
    return outcomes


def run_one(step: Step, end: float, log: Path) -> Outcome:
    """Runs a step until its limit, or until ``end`` where that is sooner. A line is in the log as soon as it comes."""
    begin, detail = time.monotonic(), ""
    limit = min(step.limit, end - begin)
    if limit <= 0:
        return Outcome(step, 1, 0.0, "the run's time was used up")
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(step, MISSING, 0.0, f"not installed: {step.command[0]} ({error.strerror})")
    signals = {limit: signal.SIGTERM, limit + GRACE: signal.SIGKILL}
    timers = [Timer(after, end_all, (process, how)) for after, how in signals.items()]
    for timer in timers:
        timer.start()
    assert process.stdout is not None
    with log.open("a", buffering=1) as file:
        for line in process.stdout:
            file.write(f"[{step.name}] {line.rstrip()}\n")
            detail = line.strip() or detail
    status, seconds = process.wait(), time.monotonic() - begin
    for timer in timers:
        timer.cancel()
    end_all(process, signal.SIGKILL)  # what it has left behind
    if status != 0 and seconds >= limit:
        return Outcome(step, 1, seconds, f"time limit of {limit:.0f} s, after: {detail}")
    return Outcome(step, status, seconds, detail or f"status {status}, and not a line")


def end_all(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Signals a step and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def summary(outcomes: Sequence[Outcome], title: str) -> tuple[str, int]:
    """Returns a line per step between two others, and the run's status: 0 if every step did what it must."""
    fatal = [outcome.step.name for outcome in outcomes if outcome.fatal]
    status = 1 if fatal or not outcomes else 0
    verdict = f"failed: {', '.join(fatal)}" if fatal else "every required step ran and passed"
    return "\n".join([title, *map(str, outcomes), f"status {status}: {verdict}"]), status
