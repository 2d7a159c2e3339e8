"""What the loss saw, added up between two lines of a trainer's log, and written into them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import EntropyAwareKLOutput


class Figures:
    """The figures of the tokens since the last line of a log, of training and of evaluation apart.

    Attributes:
        last_output: what the last call of the loss returned, for callbacks, its loss detached; None before the first.
    """

    def __init__(self) -> None:
        self.last_output: EntropyAwareKLOutput | None = None
        self._sums: dict[bool, Tensor] = {}

    def add(self, out: EntropyAwareKLOutput, training: bool) -> None:
        """Adds a micro-batch. No device is waited for."""
        self.last_output = dataclasses.replace(out, loss=out.loss.detach())  # or it would keep the gradients alive
        sums = out.sums()
        self._sums[training] = self._sums[training] + sums if training in self._sums else sums

    def means(self, training: bool = True, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Returns the means over all tokens since this was last asked, by name; empty where there are none.

        Waits for the device.

        Args:
            training: those of training (default) or of evaluation.
            reduce: makes of a process's sums those of all, such as ``Accelerator.reduce``; each process calls it then.
        """
        sums = self._sums.pop(training, None)
        if reduce is not None and self.last_output is not None:
            sums = reduce(torch.zeros_like(self.last_output.sums()) if sums is None else sums)
        if sums is None:
            return {}
        named = EntropyAwareKLOutput.means_of(sums.cpu())
        return {name: float(mean) for name, mean in named.items() if not mean.isnan()}

    def log_with(self, log: Callable[..., None], trainer: Any) -> Callable[..., None]:
        """Returns a transformers Trainer's ``log`` that adds the means of its kind to each line that has a loss.

        They are over the tokens of all micro-batches since the last such line, and of all processes.
        """

        @functools.wraps(log)
        def log_with_figures(logs: dict[str, float], *rest: Any, **options: Any) -> None:
            losses = [key for key in logs if key == "loss" or (key.endswith("_loss") and key != "train_loss")]
            for key in losses:
                prefix = key.removesuffix("loss")
                reduce = trainer.accelerator.reduce if trainer.accelerator.num_processes > 1 else None
                means = self.means(training=not prefix, reduce=reduce)
                logs.update({f"{prefix}{name}": mean for name, mean in means.items()})
            log(logs, *rest, **options)

        return log_with_figures
