"""Runs in forks of one process that has imported everything: whole, or killed at a chosen moment, or resumed.

    python -m tests.python.killed_runs FOLDER SEED KILLS [OPTION ...]

Every call of the functions below is two moments, its begin and its end; SIGKILL comes at one of them. A line of a
record may also be torn, half of it on the disk. The page at a run's end is drawn of the whole run and of the last that
is resumed; in the others it is as empty as it is quick.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import distill as program
import torch
from distillation import checkpoints, run_folder
from distillation.answering import SampledAnswers
from distillation.page import write_page
from distillation.trainer import OnPolicyTrainer

from .small_run import arguments

MOMENTS: list[tuple[Any, str]] = [
    (SampledAnswers, "__call__"),
    (OnPolicyTrainer, "compute_loss"),
    (OnPolicyTrainer, "finish_step"),
    (torch.optim.AdamW, "step"),
    (torch, "save"),
    (checkpoints, "flush"),
    (checkpoints, "rotate_checkpoints"),
    (run_folder.RunFolder, "log"),
    (os, "replace"),
    (run_folder.RunFolder, "save_model"),
]


class Moments:
    """Counts them, and ends the process at one of them."""

    def __init__(self, deadly: int | None) -> None:
        self.passed = 0
        self.deadly = deadly
        for owner, name in MOMENTS:
            setattr(owner, name, self.watched(getattr(owner, name)))
        whole = run_folder.RunFolder.log

        def torn(folder: Any, name: str, record: dict[str, Any]) -> None:
            if self.passed + 1 == self.deadly:
                with (folder.path / name).open("a") as stream:
                    stream.write(json.dumps(record)[:20])
            whole(folder, name, record)

        setattr(run_folder.RunFolder, "log", torn)  # noqa: B010

    def watched(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.passes()
            result = function(*arguments, **options)
            self.passes()
            return result

        return call

    def passes(self) -> None:
        self.passed += 1
        if self.passed == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(words: list[str], deadly: int | None, count: Path | None = None, drawn: bool = True) -> int:
    """The program's exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # mends what a fork inherits of torch's threads
        moments = Moments(deadly)
        if not drawn:
            sys.modules[write_page.__module__].page = lambda *given: ""  # type: ignore[attr-defined]
        status = program.main(words)
        if count is not None:
            count.write_text(str(moments.passed))
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, seed: int, kills: int, *more: str) -> None:
    torch.set_num_threads(1)
    words = arguments(folder, *more)
    gc.freeze()  # what is there now is not looked through in the forks
    assert in_a_fork([*words, "--output-dir", str(folder / "whole")], None, folder / "count") == 0
    total = int((folder / "count").read_text())
    rng = random.Random(seed)
    for i in range(kills):
        # One in each of so many equal parts of the run.
        deadly = rng.randint(1 + i * total // kills, (i + 1) * total // kills)
        run = folder / f"killed-{i}"
        print(f"{run.name}: moment {deadly} of {total}", flush=True)
        shutil.rmtree(run, ignore_errors=True)
        assert in_a_fork([*words, "--output-dir", str(run)], deadly, drawn=False) == -signal.SIGKILL
        assert in_a_fork(["--resume", str(run)], None, drawn=i == kills - 1) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
