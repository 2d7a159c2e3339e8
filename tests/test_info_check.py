"""python -m eopd_kernels.info --check: what it prints, and that it finds a backend that is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from eopd_kernels import reference
from eopd_kernels.backends import cpu, cuda, triton
from eopd_kernels.backends import torch as plain
from eopd_kernels.heads.lm_head import LMHead
from eopd_kernels.info import __main__ as program
from eopd_kernels.info import check


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small round is enough here, and the emulated kernels have tests of their own."""
    monkeypatch.setattr(check, "ROUNDS", 1)
    monkeypatch.setattr(check, "SIZES", {"cpu": (8, 512, 16)})
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "unavailable", lambda: "left out")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["info", *arguments])
    return program.main()


def test_there_is_a_line_for_every_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ["torch"] if cpu.unavailable() else ["cpu", "torch"]:
        line = next(line for line in lines if re.match(rf"  cpu +{name} ", line))
        assert re.search(r"ok: within \d+e-\d+ of fp64 \(.+\); \S+x (as fast as|slower than) plain PyTorch", line), line


def test_without_the_option_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(program, "check", lambda: pytest.fail("ran"))
    assert run(monkeypatch) == 0 and "available" in capsys.readouterr().out


def wrong(task: object, **arguments: object) -> None:
    plain_kernels.row_loss_and_gradient(task, **arguments)
    task.out.mul_(1.001)  # type: ignore[attr-defined]


def crashing(task: object, **arguments: object) -> None:
    raise RuntimeError("no kernel image")


plain_kernels = plain.kernels()


@pytest.mark.parametrize(
    ("kernel", "said"), [(wrong, "WRONG: within 1e-03"), (crashing, "FAILED: RuntimeError: no kernel")]
)
def test_a_backend_that_is_wrong_is_found(
    kernel: Callable[..., None], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = SimpleNamespace(**{**vars(plain_kernels), "row_loss_and_gradient": kernel})
    monkeypatch.setattr(plain, "kernels", lambda: broken)
    assert run(monkeypatch, "--check") == 1
    assert re.search(rf"  cpu +torch +{said}", capsys.readouterr().out)


def test_its_rows_lie_on_both_sides_of_the_gate() -> None:
    given = check.problem(96, 2_003, torch.device("cpu"))
    out = reference.entropy_aware_kl(
        given["student"],
        given["teacher"],
        student_head=LMHead(given["student_weight"]),
        teacher_head=LMHead(given["teacher_weight"]),
        mask=given["mask"],
    )
    assert 0.1 < out.gate.sum() / given["mask"].sum() < 0.9


def test_plain_pytorch_is_the_same_loss() -> None:
    given = check.problem(96, 2_003, torch.device("cpu"))
    sides = [given[name] for name in ("student", "teacher", "student_weight", "teacher_weight")]
    expected = reference.entropy_aware_kl(
        sides[0], sides[1], student_head=LMHead(sides[2]), teacher_head=LMHead(sides[3])
    )
    torch.testing.assert_close(check.plain(*sides), expected.loss)
