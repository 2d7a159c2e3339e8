"""What is known of a peer: its package, what it computes, and how its users call it on hidden states."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..problems import HiddenProblem


@dataclass(frozen=True)
class Peer:
    """A loss of another package.

    Args:
        name: as in the tables.
        package: the distribution it comes with.
        divergence: what it computes, a key of :data:`benchmarks.truth.OBJECTIVES` or words.
        loss: the mean over tokens.
        compiles: its first call of a shape compiles, which is neither its time nor its memory.
        gpu_only: it has no path for a CPU.
    """

    name: str
    package: str
    divergence: str
    loss: Callable[[HiddenProblem], Tensor]
    compiles: bool = False
    gpu_only: bool = False

    @property
    def version(self) -> str | None:
        """The version installed, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None
