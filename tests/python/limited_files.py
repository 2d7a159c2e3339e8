"""distill.py, to which the kernel refuses every file of more than 4 KiB from the first checkpoint on: for tests."""

from __future__ import annotations

import resource
import sys
from typing import Any

import distill
from distillation.trainer import OnPolicyTrainer


def limit() -> None:
    save = OnPolicyTrainer._save_checkpoint

    def limited(*given: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        save(*given)

    setattr(OnPolicyTrainer, "_save_checkpoint", limited)  # noqa: B010


if __name__ == "__main__":
    limit()
    sys.exit(distill.main())
