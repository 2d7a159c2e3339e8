"""Masked tokens cost no products, on a GPU either, and at most one wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import entropy_aware_kl
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case, relative_error

SCHEDULES = ["chunked", "recompute"]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretend.gpu():
        yield


def solve(case: Case, waits: int, **options: Any) -> tuple[list[Tensor], int, int]:
    """Loss and gradients, how many waits there were, and the rows of the products that made the student's logits."""
    assert case.student_head is not None
    upstream, items = torch.tensor(1.3), torch.tensor(80)
    with pretend.Watch(waits) as watch:
        out = entropy_aware_kl(case.student, case.teacher, **case.arguments, num_items=items, **options)
        gradients = torch.autograd.grad(out.loss, case.leaves, upstream)
    width = case.student.shape[-1]
    rows = sum(m for (m, k, v), *_ in watch.products if k == width and v == len(case.student_head.weight))
    return [out.loss, *gradients], waits - watch.waits, rows


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_tokens_are_left_out_with_one_wait(schedule: str) -> None:
    case = make_case(masked=True)
    assert case.mask is not None
    passes = {"chunked": 1, "recompute": 2}[schedule]
    left_out, waits, rows = solve(case, 9, schedule=schedule)
    assert waits == 1 and rows == passes * int(case.mask.sum())
    riding, waits, rows = solve(case, 0, schedule=schedule, wait_free=True)
    assert waits == 0 and rows == passes * case.mask.numel()
    for a, b in zip(left_out, riding, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_asked_where_all_tokens_count(schedule: str) -> None:
    _, waits, _ = solve(make_case(), 0, schedule=schedule)
    assert waits == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("teacher", ["hidden", "logits"])
def test_what_was_counted_in_vain_is_not_counted_again(teacher: str, schedule: str) -> None:
    """A mask that leaves out nothing, or too little to copy a teacher's logits together for it."""
    case = make_case(leading=(100,), teacher=teacher)
    mask = torch.arange(100) < (100 if teacher == "hidden" else 90)
    _, waits, _ = solve(replace(case, mask=mask), 9, schedule=schedule)
    assert waits == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_graph_that_is_captured_never_waits(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(masked=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _, waits, rows = solve(case, 0, schedule=schedule)
    assert waits == 0 and rows % case.student[..., 0].numel() == 0


def test_labels_are_counted_like_a_mask() -> None:
    case = make_case()
    labels = torch.zeros(case.student.shape[:-1], dtype=torch.long)
    labels[0] = -100
    _, waits, rows = solve(replace(case, per_token={"labels": labels}), 1)
    assert waits == 1 and rows == int((labels == 0).sum())


@pytest.mark.parametrize(("share", "copied"), [(0.5, True), (0.9, False)])
def test_a_teachers_logits_are_copied_together_where_that_pays(share: float, copied: bool) -> None:
    case = make_case(leading=(100,), teacher="logits")
    mask = torch.arange(100) < 100 * share
    _, waits, rows = solve(replace(case, mask=mask), 1)
    assert waits == 1 and rows == (100 * share if copied else 100)


def test_several_teachers_by_masks_pay_for_their_tokens_only() -> None:
    case = make_case()
    owner = torch.arange(case.student[..., 0].numel()).view(case.student.shape[:-1]) % 3
    rows = [solve(replace(case, mask=owner == teacher), 1)[2] for teacher in range(3)]
    assert sum(rows) == owner.numel()
