"""Which positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, Sampled, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved

FORWARD = Objective.forward_kl()


def test_labels_are_left_out_by_their_mark_and_by_nothing_else() -> None:
    """huggingface/trl#6357: with pad == eos the end of every answer was taken for padding, and no student learnt to
    stop; ibm-granite/granite-3.1-language-models#2 and QwenLM/Qwen#1080 asked about it."""
    end = 2  # the end of a sequence, and what pads it
    labels = torch.tensor([[-100, 5, 7, end, -100], [-100, 9, end, -100, -100]])
    token_ids = torch.tensor([[4, 5, 7, end, end], [4, 9, end, end, end]])
    student, teacher = normal(2, 5, 12, seed=1), normal(2, 5, 12, seed=2)
    loss, ours = solved(student, teacher, labels=labels, objective=FORWARD)
    close(loss, plain(student, teacher).forward_kl[labels != -100].mean())
    assert (ours.abs().amax(-1) > 0).equal(labels != -100)
    sampled = Objective(reverse=Sampled(), forward="none", gate="never")
    known: dict[str, Any] = {"token_ids": token_ids, "old_log_probs": torch.full((2, 5), -2.0)}
    out = entropy_aware_kl(student, teacher, labels=labels, objective=sampled, reduction="none", **known)
    assert (out.loss != 0).equal(labels != -100)


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
@pytest.mark.parametrize("hidden", [False, True])
def test_ignore_index_is_applied_and_counted(hidden: bool, ignore_index: int) -> None:
    """linkedin/Liger-Kernel#974: a JSD took ignore_index and used it nowhere, prompts and padding included;
    jxiw/MambaInLlama#11 likewise."""
    labels = torch.randint(0, 12, (3, 8), generator=torch.Generator().manual_seed(0))
    labels[:, :3] = ignore_index
    tokens, weight = normal(3, 8, 6, seed=1), normal(12, 6, seed=3)
    student = tokens if hidden else normal(3, 8, 12, seed=1)
    teacher = normal(3, 8, 12, seed=2)
    options: dict[str, Any] = {"labels": labels, "ignore_index": ignore_index, "objective": Objective.jsd(0.5)}
    loss, ours = solved(student, teacher, student_head=LMHead(weight) if hidden else None, **options)
    leaf = student.double().requires_grad_()
    p = (leaf @ weight.double().t() if hidden else leaf).softmax(-1)
    q = teacher.double().softmax(-1)
    m = (p + q) / 2
    each = (q * (q / m).log() + p * (p / m).log()).sum(-1) / 2
    truth = each[labels != ignore_index].mean()
    close(loss, truth)
    close(ours, gradient(truth, leaf))


@pytest.mark.parametrize("position", [0, 3, 6])
def test_nothing_is_shifted(position: int) -> None:
    """linkedin/fmchisel#23: the teacher's logits were shifted once more; LLM360/amber-train#6, modelscope/ms-
    swift#8427: labels shifted twice, a mask that belonged to the next token."""
    student, teacher = normal(2, 7, 10, seed=1), normal(2, 7, 10, seed=2)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, position] = True
    loss, ours = solved(student, teacher, mask=mask, objective=FORWARD)
    close(loss, plain(student[1, position], teacher[1, position]).forward_kl)
    assert ours.abs().amax(-1).nonzero().tolist() == [[1, position]]


def masks() -> list[Tensor]:
    """The same weights 0 and 1 in every form."""
    one = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    dtypes = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int64,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    )
    return [one.to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: str(mask.dtype))
def test_a_mask_of_any_dtype(mask: Tensor) -> None:
    """PaddlePaddle/PaddleSeg#2360, MakazhanAlpamys/Soup#943: left-out positions were set to 0 and still counted."""
    student, teacher = normal(2, 4, 10, seed=1), normal(2, 4, 10, seed=2)
    loss, _ = solved(student, teacher, mask=mask, objective=FORWARD)
    close(loss, plain(student, teacher).forward_kl[mask.bool()].mean())


def test_unequal_rows_weigh_by_their_tokens() -> None:
    """MakazhanAlpamys/Soup#943: rows of 2 and of 16 targets in two micro-batches, off by 78 % in the gradient's
    norm."""
    student, teacher = normal(8, 16, 10, seed=1), normal(8, 16, 10, seed=2)
    mask = torch.arange(16) < torch.tensor([2] * 4 + [16] * 4).unsqueeze(1)
    leaf = student.double().requires_grad_()
    truth = gradient(plain(leaf, teacher).forward_kl[mask].mean(), leaf)
    parts = [
        solved(student[rows], teacher[rows], mask=mask[rows], num_items=mask.sum(), objective=FORWARD)[1]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    close(torch.cat(parts), truth)
