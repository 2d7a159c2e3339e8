"""Each barrier of the CUDA kernels is needed, and its absence is seen: taken out one at a time, results go wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from eopd_kernels.backends import cuda as backend
from eopd_kernels.backends.cuda.plan import REGISTERS, SHARED
from eopd_kernels.testing import emulation
from tests.backends.test_cuda_rows import CUDA, planned, solve
from tests.test_rows import IDENTITY, block

pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
KERNELS = emulation.ROOT / "csrc" / "cuda"
BARRIER = re.compile(r"hardware::(block_barrier|cluster_barrier|wait_for_copies<\w+>)\(\);")
SEEDS = range(8)


def barriers() -> Iterator[tuple[str, int]]:
    """The file and the position of every barrier."""
    for path in sorted(KERNELS.glob("*.cuh")):
        for match in BARRIER.finditer(path.read_text()):
            yield path.name, match.start()


def test_they_are_found() -> None:
    found = [BARRIER.match((KERNELS / name).read_text(), at)[1] for name, at in barriers()]  # type: ignore[index]
    assert sorted(found) == [
        "block_barrier",
        *2 * ["cluster_barrier"],
        "wait_for_copies<0>",
        "wait_for_copies<groups_ahead>",
    ]


@pytest.mark.parametrize(("file", "position"), list(barriers()))
def test_without_it_results_are_wrong(file: str, position: int, tmp_path: Path) -> None:
    text = (KERNELS / file).read_text()
    missing = emulation.loaded(
        emulation.variant(tmp_path, file, text[:position] + BARRIER.sub("", text[position:], count=1))
    )
    student, teacher = block(5, 2051)
    wrong = 0
    for seed in SEEDS:
        for kept in (SHARED, REGISTERS):
            with planned(kept, 4, seed, threads=96):
                expected = solve(CUDA, student, teacher, IDENTITY, torch.float32)
            with mock.patch.object(backend, "kernels", lambda: missing), planned(kept, 4, seed, threads=96):
                found = solve(CUDA, student, teacher, IDENTITY, torch.float32)
            wrong += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert wrong > 0
