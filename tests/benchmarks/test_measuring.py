"""The meters themselves: a known allocation is seen, and a sample prints what it holds."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import Sample
from eopd_kernels.testing.processes import MIB, fresh_process, peak_memory


def peaks_of(mebibytes: int) -> list[int]:
    def step() -> list[torch.Tensor]:
        return [torch.ones(mebibytes * MIB // 2, dtype=torch.uint8) for _ in range(2)]

    return [peak_memory(step) for _ in range(3)]


def peaks_of_a_temporary(mebibytes: int) -> list[int]:
    def step() -> None:
        torch.ones(mebibytes * MIB, dtype=torch.uint8)

    return [peak_memory(step) for _ in range(3)]


@pytest.mark.parametrize("function", [peaks_of, peaks_of_a_temporary])
def test_a_known_allocation_is_seen_in_a_fresh_process(function: Callable[[int], list[int]]) -> None:
    """Pages of torch's own code, which systems take back, come back at any moment and count: seen once, 9 MiB."""
    first, *again = fresh_process(function, 64)
    assert first >= 64 * MIB
    assert min(first, *again) < 66 * MIB


def test_fresh_processes_are_new() -> None:
    assert fresh_process(os.getpid) != os.getpid()


def test_ratios_are_taken_within_a_round() -> None:
    slow, fast = Sample((2.0, 40.0, 2.0), "s"), Sample((1.0, 20.0, 1.0), "s")
    assert (slow / fast).values == (2.0, 2.0, 2.0)
    assert (Sample((3.0,), "s") / fast).values == (3.0,)  # who left early


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (Sample((1.25, 1.0, 2.0), "s"), "1.25 s (1.00–2.00)"),
        (Sample((0.0125,), "s"), "12.5 ms"),
        (Sample((25.04, 31.3, 25.0), "x"), "25.0x (25.0–31.3)"),
        (Sample((131.7,), "MiB"), "132 MiB"),
    ],
)
def test_samples_in_words(sample: Sample, text: str) -> None:
    assert str(sample) == text
