"""Each barrier of the CUDA kernels is needed, and its absence is seen: taken out one at a time, results go wrong."""

from __future__ import annotations

import re
import shutil
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
BARRIER = re.compile(r"hardware::(block_barrier|cluster_arrive|cluster_release|cluster_wait|wait_for_copies<\w+>)\(\);")
SEEDS = range(8)
MISSING = "EOPD_MISSING_BARRIER"
EARLY = 100
PUSH = "      if (lane < hardware::cluster_size())\n        *hardware::in_shared_memory_of"


def barriers() -> Iterator[tuple[str, int]]:
    """The file and the position of every barrier."""
    for path in sorted(KERNELS.glob("*.cuh")):
        for match in BARRIER.finditer(path.read_text()):
            yield path.name, match.start()


PLACES = list(barriers())


def test_they_are_found() -> None:
    found = [BARRIER.match((KERNELS / name).read_text(), at)[1] for name, at in PLACES]  # type: ignore[index]
    assert sorted(found) == [
        "block_barrier",
        *2 * ["cluster_arrive"],
        "cluster_release",
        *2 * ["cluster_wait"],
        "wait_for_copies<0>",
        "wait_for_copies<groups_ahead>",
    ]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels that go past one barrier, which the environment names when they are loaded; compiled once for all."""
    folder = tmp_path_factory.mktemp("barriers")
    changed = {}
    for name in sorted({name for name, _ in PLACES}):
        text, variable = (KERNELS / name).read_text(), f"missing_{Path(name).stem}"
        for number, (file, position) in reversed([*enumerate(PLACES)]):
            if file == name:
                text = f"{text[:position]}if ({variable} != {number}) {text[position:]}"
        if name == "merge.cuh":  # EARLY: the cluster is told before the parts are there
            assert text.count(PUSH) == 1
            text = text.replace(PUSH, f"if ({variable} == {EARLY}) hardware::cluster_release ();\n{PUSH}")
            text = text.replace(
                "hardware::cluster_release();", f"if ({variable} != {EARLY}) hardware::cluster_release();"
            )
        changed[name] = (
            f'#include <cstdlib>\nstatic const int {variable} = std::atoi(std::getenv("{MISSING}"));\n{text}'
        )
    # ``variant`` changes one file: it finds the others changed.
    (first, text), *others = changed.items()
    shutil.copytree(emulation.ROOT / "csrc", folder / "changed" / "csrc")
    for name, other in others:
        (folder / "changed" / "csrc" / "cuda" / name).write_text(other)
    with mock.patch.object(emulation, "ROOT", folder / "changed"):
        return emulation.variant(folder, first, text)


def wrong_results(module: Path, missing: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often, of so many orders of the threads, kernels without a barrier (-1: with all) give other results."""
    monkeypatch.setenv(MISSING, str(missing))
    # A file of its own is loaded anew.
    copy = folder / f"missing-{missing}" / module.name
    copy.parent.mkdir()
    shutil.copy(module, copy)
    changed = emulation.loaded(copy)
    student, teacher = block(5, 2051)
    wrong = 0
    for seed in SEEDS:
        for kept in (SHARED, REGISTERS):
            with planned(kept, 4, seed, threads=96):
                expected = solve(CUDA, student, teacher, IDENTITY, torch.float32)
            try:
                with mock.patch.object(backend, "kernels", lambda: changed), planned(kept, 4, seed, threads=96):
                    found = solve(CUDA, student, teacher, IDENTITY, torch.float32)
            except RuntimeError as error:  # half a barrier is refused, and does not end
                assert re.search("has not waited|has not arrived|deadlock", str(error))
                wrong += 1
            else:
                wrong += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return wrong


@pytest.mark.parametrize("number", range(len(PLACES)), ids=[f"{name}-{position}" for name, position in PLACES])
def test_without_it_results_are_wrong(
    number: int, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong_results(module, number, tmp_path, monkeypatch) > 0


def test_whoever_arrives_before_it_has_written_is_caught(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong_results(module, EARLY, tmp_path, monkeypatch) > 0


def test_with_all_of_them_they_are_right(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_results(module, -1, tmp_path, monkeypatch) == 0
