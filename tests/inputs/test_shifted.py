"""shifted: a batch's tokens become the positions that predict them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eopd_kernels import Objective, Sampled, entropy_aware_kl, shifted

IDS = torch.tensor([[5, 3, 7, 2, 6], [1, 4, 4, 0, 2]])
LABELS = IDS.masked_fill(torch.arange(5) < 2, -100)


def test_each_tensor_moves_by_one() -> None:
    moved = shifted(labels=LABELS, token_ids=IDS, mask=IDS > 2, old_log_probs=-IDS.float())
    assert torch.equal(moved["labels"], torch.tensor([[-100, 7, 2, 6, -100], [-100, 4, 0, 2, -100]]))
    assert torch.equal(moved["token_ids"], torch.tensor([[3, 7, 2, 6, 0], [4, 4, 0, 2, 0]]))
    assert torch.equal(moved["mask"], torch.tensor([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0]]).bool())
    assert torch.equal(moved["old_log_probs"], -moved["token_ids"].float())
    assert torch.equal(IDS[:, 0], torch.tensor([5, 1])), "what was given stays"


def test_it_is_what_slicing_by_hand_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 8, generator=generator).unbind()
    old = -2 * torch.rand(2, 5, generator=generator)
    objective = Objective(reverse=Sampled())
    given: dict[str, Any] = {"labels": LABELS, "token_ids": IDS, "old_log_probs": old, "reverse_weights": -old}
    out = entropy_aware_kl(student, teacher, objective=objective, **shifted(**given))
    sliced: list[Any] = [t[:, 1:] for t in given.values()]
    by_hand = entropy_aware_kl(
        student[:, :-1], teacher[:, :-1], objective=objective, **dict(zip(given, sliced, strict=True))
    )
    torch.testing.assert_close(out.loss, by_hand.loss)
    torch.testing.assert_close(out.student_log_probs[:, :-1], by_hand.student_log_probs)  # type: ignore[index]
    expected = student.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0] * (LABELS[:, 1:] != -100)
    torch.testing.assert_close(out.student_log_probs[:, :-1], expected)  # type: ignore[index]
    assert not out.valid[:, -1].any() and out.valid[:, 1:-1].all()


@pytest.mark.parametrize("name", ["token_ids", "mask", "labels", "gate"])
def test_the_last_position_is_always_left_out(name: str) -> None:
    given: dict[str, Any] = {name: torch.ones(2, 5, dtype=torch.uint8)}
    student = torch.zeros(2, 5, 8)
    out = entropy_aware_kl(student, student, **shifted(**given))
    assert out.valid[:, :-1].all() and not out.valid[:, -1].any()


def test_another_ignore_index_and_other_shapes() -> None:
    assert shifted(labels=torch.tensor([4, 5], dtype=torch.uint8), ignore_index=-1)["labels"].tolist() == [5, -1]
    assert shifted(mask=torch.ones(2, 3, 0))["mask"].shape == (2, 3, 0)
    assert shifted() == {}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"label": LABELS}, TypeError, r"shifted\(\) got an unexpected keyword argument 'label': 'labels' is one"),
        ({"labels": [1, 2]}, TypeError, "labels must be a tensor, got a list"),
        ({"mask": torch.tensor(1.0)}, ValueError, r"mask must have the shape \[..., T\], got \(\)"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        shifted(**given)
