"""distill.py, whose second process is twice later in an evaluation than a collective would wait: for tests."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from functools import partial
from typing import Any

import distill
import torch.distributed as dist
from distillation.evaluation import Results

# Seconds, in the place of --ddp-timeout: on busy cores two forks come to a collective some seconds apart.
TIMEOUT = 12
LATE = TIMEOUT + 2.0


def be_late() -> None:
    # As transformers 5.24 does on a GPU; on a CPU it forgets --ddp-timeout, and torch waits for half an hour.
    setattr(dist, "init_process_group", partial(dist.init_process_group, timeout=timedelta(seconds=TIMEOUT)))  # noqa: B010
    evaluated = Results.evaluated

    def late(self: Any, name: str, model: Any, label: str, trainer: Any = None) -> Any:
        first = label == "student at start" or (trainer is not None and trainer.state.global_step == 1)
        if dist.get_rank() == 1 and name == "held-out" and first:
            time.sleep(LATE)
        return evaluated(self, name, model, label, trainer)

    Results.evaluated = late  # type: ignore[method-assign]


if __name__ == "__main__":
    be_late()
    sys.exit(distill.main())
