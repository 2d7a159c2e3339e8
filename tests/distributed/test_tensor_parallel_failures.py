"""What does not fit together is an error on every rank, and a rank that dies is the group's own error, not a hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from eopd_kernels import Objective, Sampled, entropy_aware_kl
from tests.distributed.processes import run_ranks, start_ranks
from tests.distributed.shards import halves_of, solved
from tests.test_objectives import case_of


def refused() -> dict[str, str]:
    """The errors of calls that no rank may answer or wait for."""
    rank, group = dist.get_rank(), dist.group.WORLD
    case, logits = case_of(Objective()), torch.zeros(4, 6)

    def error(*arguments: Any, **options: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as raised:
            entropy_aware_kl(*arguments, **{"tensor_parallel_group": group, **options})
        return f"{type(raised.value).__name__}: {raised.value}"

    part, other = halves_of(case), halves_of(case, [300, 311])
    heads = {"student_head": part.student_head, "teacher_head": other.teacher_head}
    return {
        "sizes": error(part.student, part.teacher, **heads),
        "sizes on one rank": error(logits, torch.zeros(4, 6 + rank)),
        "vocab_size": error(logits, logits, vocab_size=12 - rank),
        "too large": error(logits, logits, vocab_size=13),
        "nothing": error(logits[:, :0], logits[:, :0]),
        "tokens": error(logits[rank:], logits[rank:]),
        "options": error(logits, logits, schedule=("chunked", "recompute")[rank]),
        "gate": error(logits, logits, objective=Objective(gate=("always", "never")[rank])),
        "alpha": error(logits, logits, objective=Objective(alpha=1.0 + rank)),
        "group": error(logits, logits, tensor_parallel_group="tp"),
        "mesh": error(logits, logits, tensor_parallel_group=init_device_mesh("cpu", (1, 2))),
        "partial": error(logits, logits, partial_hidden_gradient=True),
        "partial alone": error(
            part.student,
            part.teacher,
            student_head=part.student_head,
            teacher_head=part.teacher_head,
            tensor_parallel_group=None,
            partial_hidden_gradient=True,
        ),
        "token_ids": error(
            logits,
            logits,
            objective=Objective(reverse=Sampled()),
            token_ids=torch.full((4,), 12),
            old_log_probs=torch.zeros(4),
        ),
    }


def test_what_does_not_fit_together_is_refused_on_every_rank() -> None:
    says = {
        "sizes": "ValueError: student and teacher must have shards of the same sizes on each rank of "
        "tensor_parallel_group, got student [305, 306] and teacher [300, 311]",
        "sizes on one rank": "got student [6, 6] and teacher [6, 7]",
        "vocab_size": "vocab_size must be the same on every rank of tensor_parallel_group, got [12, 11]",
        "too large": "vocab_size must be between 1 and the smaller vocabulary of all ranks together (student 12, "
        "teacher 12), got 13",
        "nothing": "at least one entry of the vocabulary on some rank",
        "tokens": "must be called with the same tokens and options",
        "options": "must be called with the same tokens and options",
        "gate": "must be called with the same tokens and options",
        "alpha": "must be called with the same tokens and options",
        "group": "TypeError: tensor_parallel_group must be a ProcessGroup",
        "mesh": "TypeError: tensor_parallel_group must have one dimension",
        "partial": "ValueError: partial_hidden_gradient=True is for hidden states",
        "partial alone": "and no group",
        "token_ids": "token_ids must be in [0, 12) where they count, got 12",
    }
    for found in run_ranks(2, refused):
        for name, message in found.items():
            assert says[name] in message


def outlives_a_killed_rank(report: str) -> None:
    """Rank 1 is killed between two calls; the group's timeout is 20 s."""
    part, options = halves_of(case_of(Objective())), {"tensor_parallel_group": dist.group.WORLD}
    solved(part, **options)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for _ in range(3):
            solved(part, **options)
    except RuntimeError as error:
        Path(report).write_text(f"{time.monotonic() - started} {error}")
    os._exit(0)  # no goodbye to a group that is broken


def test_a_killed_rank_is_the_groups_own_error(tmp_path: Path) -> None:
    report = tmp_path / "report"
    # Not run_ranks, which ends the survivor as soon as the other is gone.
    survivor, killed = start_ranks(2, str(tmp_path), 20.0, outlives_a_killed_rank, (str(report),)).processes
    try:
        survivor.join(100)
        assert survivor.exitcode == 0 and report.exists(), "the survivor hangs, or met no error"
    finally:
        for process in (survivor, killed):
            process.kill()
            process.join()
    assert killed.exitcode == -signal.SIGKILL
    seconds, message = report.read_text().split(" ", 1)
    assert float(seconds) < 30 and "gloo" in message.lower()
