"""Checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from .errors import RunError

PARTIAL = "partial"  # no name that the library takes for a checkpoint


class AtomicCheckpoints(Trainer):
    """Has a Trainer write a checkpoint into a folder aside, and renames it when everything is on the disk.

    A process that is killed meanwhile leaves a folder that nobody reads, and the next checkpoint removes it. A
    checkpoint that cannot be written ends the run with the path and the last complete one.
    """

    _aside: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        if (output / name).exists():
            return
        partial = output / PARTIAL
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._aside = str(partial)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # A pickle of the arguments, which config.json has in a readable form.
                (partial / name / "training_args.bin").unlink(missing_ok=True)
                flush(partial)
                os.replace(partial / name, output / name)
                shutil.rmtree(partial)
                rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = get_last_checkpoint(str(output))
            kept = f"the last complete one is {last}" if last else "there is none before it"
            reason = " ".join(str(error).split())
            raise RunError(f"cannot write the checkpoint {output / name}: {reason}; {kept}") from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint in a folder, if there is one."""
    return get_last_checkpoint(str(output)) if output.is_dir() else None


def flush(folder: Path) -> None:
    """Waits until the disk has every file of ``folder``: a power cut must not leave a renamed folder of empty files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
