"""A run that was killed, interrupted or that ran out of disk goes on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation import checkpoints
from distillation.run_folder import RunFolder
from distillation.trainer import OnPolicyTrainer

from tests.processes import run_program

from .small_run import arguments, comparable, lines

pytestmark = pytest.mark.usefixtures("undrawn")

SEED, KILLS = 20, 5


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves and that no clock has a hand in; weights byte by byte."""
    return {
        "metrics": [comparable(record) for record in lines(folder)],
        "completions": (folder / "completions.jsonl").read_text(),
        "histograms": (folder / "histograms.jsonl").read_text(),
        "evaluations": (path.read_text() if (path := folder / "evaluations.jsonl").exists() else None),
        "results": (folder / "results.json").read_text(),
        "weights": [path.read_bytes() for path in sorted(folder.glob("student-*/*model.safetensors"))],
        "folders": sorted(path.name for path in folder.glob("**/*") if path.is_dir()),
    }


# Rollouts of four steps: the checkpoint of the second is in the middle of one, the run's end of another.
ROLLOUTS = ("--objective=paper", "--rollout-prompts=32", "--eval-steps=2")


@pytest.mark.parametrize(
    ("more", "kills"), [((), KILLS), (ROLLOUTS, KILLS), (("--lora-r=4",), 1)], ids=["steps", "rollouts", "lora"]
)
def test_a_run_killed_at_any_moment_resumes_exactly(more: tuple[str, ...], kills: int, tmp_path: Path) -> None:
    run = run_program("tests.python.killed_runs", str(tmp_path), str(SEED), str(kills), *more)
    assert run.returncode == 0, run.stdout + run.stderr
    expected = outcome(tmp_path / "whole")
    assert [record["step"] for record in expected["metrics"]] == [1, 2, 3, 4, 5, 6] and expected["weights"]
    if more == ROLLOUTS:
        clipped = [record["clipped_by_ratio"] > 0 for record in expected["metrics"]]
        assert clipped == [False, False, True, True, False, True]  # the first step's learning rate is 0
        assert [record["step"] for record in lines(tmp_path / "whole", "evaluations.jsonl")] == [2, 4]
    for i in range(kills):
        found = outcome(tmp_path / f"killed-{i}")
        for name, value in expected.items():
            assert found[name] == value, f"seed {SEED}, killed-{i}: {name}; {run.stdout}"


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path)
    assert program.main([*words, "--output-dir", str(tmp_path / "whole")]) == 0
    compute_loss = OnPolicyTrainer.compute_loss

    def interrupted(trainer: OnPolicyTrainer, *given: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2 and not trainer.stop_requested:
            signal.raise_signal(signal.SIGINT)
        return compute_loss(trainer, *given, **options)

    monkeypatch.setattr(OnPolicyTrainer, "compute_loss", interrupted)
    run = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    assert program.main([*words, "--output-dir", str(run)]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [record["step"] for record in lines(run)] == [1, 2, 3]
    assert (run / "checkpoints" / "entropy-aware" / "checkpoint-3").is_dir()
    error = capsys.readouterr().err
    assert "stopping after this step" in error and f"--resume {run}" in error and "Traceback" not in error
    monkeypatch.undo()
    assert program.main(["--resume", str(run)]) == 0
    found, expected = outcome(run), outcome(tmp_path / "whole")
    # One more checkpoint was kept on the way.
    assert {**found, "folders": None} == {**expected, "folders": None}


def test_a_full_disk_is_named_and_the_last_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path)
    save = torch.save

    def full(content: Any, path: Any, *given: Any, **options: Any) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(content, path, *given, **options)

    monkeypatch.setattr(torch, "save", full)
    run = tmp_path / "run"
    assert program.main([*words, "--output-dir", str(run)]) == 1
    error = capsys.readouterr().err
    folder = run / "checkpoints" / "entropy-aware"
    assert f"cannot write the checkpoint {folder / 'checkpoint-4'}: " in error and "No space left" in error
    assert f"the last complete one is {folder / 'checkpoint-2'}" in error and len(error.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert program.main(["--resume", str(run)]) == 0
    assert [record["step"] for record in lines(run)] == [1, 2, 3, 4, 5, 6]


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    """The writers of weights have error types of their own; the kernel's limit reaches them all."""
    words = arguments(tmp_path, "--output-dir", str(tmp_path / "run"))
    run = run_program("tests.python.limited_files", *words)
    assert run.returncode == 1, run.stderr
    assert "cannot write the checkpoint" in run.stderr and "checkpoint-2: " in run.stderr
    assert "there is none before it" in run.stderr and "Traceback" not in run.stderr


def test_a_partial_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / checkpoints.PARTIAL / "checkpoint-8").mkdir(parents=True)
    assert checkpoints.last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-2").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_records_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resumed=False)
    folder.write("config.json", {})
    for name, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)):
        folder.log("metrics.jsonl", {"run": name, "step": step})
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"run": "b", "st')
    folder.forget_after("b", 1)
    found = [(record["run"], record["step"]) for record in lines(folder.path)]
    assert found == [("a", 1), ("a", 2), ("b", 1)]


def test_resume_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--resume", str(tmp_path), "--tau", "1"]) == 2
    assert "argument --resume: stands alone" in capsys.readouterr().err
    assert program.main(["--resume", str(tmp_path / "none")]) == 2
    assert "argument --resume: cannot read" in capsys.readouterr().err
