"""Several processes produce what one does: the same tokens, the same loss curve and weights to rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import distill as program
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.distributed.processes import free_port
from tests.processes import run_programs

from .small_run import arguments, comparable, lines

ROOT = Path(__file__).parents[2]
# The global batch is 8 in each case; for one process it is cut otherwise, into one micro-batch.
BOTH = ("--max-steps=3", "--eval-steps=1", "--eval-samples=2", "--evaluation-batch-size=3")  # of three batches
ONE = (*BOTH, "--per-device-train-batch-size=8", "--gradient-accumulation-steps=1")
TWO = (*BOTH, "--per-device-train-batch-size=2", "--gradient-accumulation-steps=2")
ROLLOUTS = ("--objective=paper", "--rollout-prompts=24")  # of three steps: the checkpoint of the second is within
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port={port}")
FSDP2, LATE = "tests.python.fsdp_on_cpus", "tests.python.late_process"
# accelerate starts several processes on CPUs by mpirun only; as for GPUs it starts them itself, and --use-cpu decides.
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_ip=127.0.0.1", "--main_process_port={port}"),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, beside which the others find the same models and prompts."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "asked.jsonl").write_text("".join(f'{{"prompt": "w{i} w9", "answer": "w{i}"}}\n' for i in range(5, 9)))
    assert program.main(words(folder, "alone", *ONE)) == 0
    assert program.main(words(folder, "alone-rollouts", *ONE, *ROLLOUTS)) == 0
    return folder


def words(folder: Path, name: str, *more: str) -> list[str]:
    """Of a run with two sets of prompts to evaluate with, of which the second has answers."""
    return arguments(folder, f"--eval-sets={folder / 'asked.jsonl'}", f"--output-dir={folder / name}", *more)


def launched(launcher: tuple[str, ...], *given: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(word.format(port=free_port()) for word in (*launcher, program.__file__)), *given]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=240)


def in_two_forks(module: str, *given: str) -> subprocess.CompletedProcess[str]:
    """As torchrun starts two processes, without the ten seconds in which an interpreter imports all it needs."""
    of_all = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**of_all, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return run_programs([(module, given)] * 2, environments)


def weights(run: Path) -> dict[str, torch.Tensor]:
    (student,) = run.glob("student-*")
    return AutoModelForCausalLM.from_pretrained(student).state_dict()


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = lines(found), lines(expected)
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        ours_then, theirs_then = ({k: v for k, v in comparable(line).items() if k != "run"} for line in (one, other))
        assert ours_then == pytest.approx(theirs_then, rel=1e-4, abs=1e-6)
        assert one["tokens"] == other["tokens"]
    evaluated, alone = (json.loads((run / "results.json").read_text())["models"] for run in (found, expected))
    assert evaluated[:4] == alone[:4] and [row["set"] for row in alone] == ["held-out", "asked"] * 3  # byte by byte
    assert evaluated[4:] == [
        {**row, "agreement": pytest.approx(row["agreement"], rel=1e-3, abs=1e-5)} for row in alone[4:]
    ]
    between, expected_between = (lines(run, "evaluations.jsonl") for run in (found, expected))
    assert [line.pop("run") for line in between] == [line.pop("run") for line in expected_between]
    assert between == [pytest.approx(line, rel=1e-3, abs=1e-5) for line in expected_between] and len(between) == 2
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def late(alone: Path) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """Two processes, in the folder ``late``, that mostly wait for each other: the other tests run meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(in_two_forks, LATE, *words(alone, "late", *TWO))


@pytest.fixture(scope="module")
def shared_out(alone: Path) -> subprocess.CompletedProcess[str]:
    """Two processes that FSDP2 shares the student out to, as the 4B config asks it, in the folder ``fsdp2``."""
    config = yaml.safe_load((ROOT / "configs" / "dapo-14k-qwen3-4b.yaml").read_text())
    asked = {name: config[name] for name in ("fsdp", "fsdp_config", "activation_checkpointing")}
    (alone / "fsdp2.json").write_text(json.dumps(asked))
    return in_two_forks(FSDP2, "--config", str(alone / "fsdp2.json"), *words(alone, "fsdp2", *TWO))


def check_two_equal_one(run: Path, alone: Path, result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    check_same(run, alone / "alone")
    assert result.stdout.count("distilling with") == 1  # one process speaks


def test_two_processes_with_a_shared_out_student_equal_one(
    alone: Path, shared_out: subprocess.CompletedProcess[str]
) -> None:
    check_two_equal_one(alone / "fsdp2", alone, shared_out)


def test_two_processes_share_a_rollout_and_go_on_in_the_middle_of_it(alone: Path) -> None:
    """Interpreters of their own, each with its own seed of ``hash``; begun by accelerate, gone on with by torchrun."""
    run = alone / "rollouts"
    result = launched(ACCELERATE, *words(alone, run.name, *TWO, *ROLLOUTS))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("distilling with") == 1
    check_same(run, alone / "alone-rollouts")
    clipped = [line["clipped_by_ratio"] > 0 for line in lines(run)]
    assert clipped == [False, False, True]  # the first step's learning rate is 0
    whole = [comparable(line) for line in lines(run)]
    for late in ("student-paper", "checkpoints/paper/checkpoint-3"):
        shutil.rmtree(run / late)
    resumed = launched(TORCHRUN, "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert [comparable(line) for line in lines(run)] == whole


def test_a_shared_out_student_goes_on_where_it_stopped(
    alone: Path, shared_out: subprocess.CompletedProcess[str]
) -> None:
    assert shared_out.returncode == 0, shared_out.stderr
    run = alone / "fsdp2"
    # As if it had been killed in its third step, with a checkpoint of every second one.
    for late in ("student-entropy-aware", "checkpoints/entropy-aware/checkpoint-3"):
        shutil.rmtree(run / late)
    (run / "results.json").unlink()
    result = in_two_forks(FSDP2, "--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert "from step 2, as" in result.stdout
    check_same(run, alone / "alone")


def test_two_processes_of_which_one_is_late_equal_one(
    alone: Path, late: Future[subprocess.CompletedProcess[str]]
) -> None:
    check_two_equal_one(alone / "late", alone, late.result())
