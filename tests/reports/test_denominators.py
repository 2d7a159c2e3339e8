"""What the sum over tokens is divided by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved

FORWARD = Objective.forward_kl()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of 6 sequences, and a mask with 1, 0, 9, 4, 7 and 2 valid tokens."""
    lengths = torch.tensor([1, 0, 9, 4, 7, 2])
    return normal(6, 9, 31, seed=1), normal(6, 9, 31, seed=2), torch.arange(9) < lengths.unsqueeze(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_the_split_into_micro_batches_changes_nothing(rows: int) -> None:
    """verl-project/verl#7200: with micro-batches of 1 the sum of means of sequences, eight times the token mean."""
    student, teacher, mask = batch()
    leaf = student.requires_grad_()
    truth = (plain(leaf, teacher).forward_kl * mask).sum() / 23
    expected = gradient(truth, leaf)
    leaf.grad = None
    total = torch.zeros(())
    for s, t, m in zip(leaf.split(rows), teacher.split(rows), mask.split(rows), strict=True):
        loss = entropy_aware_kl(s, t, mask=m, num_items=mask.sum(), objective=FORWARD).loss
        (1.7 * loss).backward()
        total += loss.detach()
    assert leaf.grad is not None
    close(total, truth)
    close(leaf.grad, expected)


def test_a_micro_batch_without_a_valid_sample() -> None:
    """NVIDIA-NeMo/RL#212: one whose samples were all masked still counted in the average over micro-batches."""
    student, teacher, mask = batch()
    alone, of_alone = solved(student[1:2], teacher[1:2], mask=mask[1:2], num_items=mask.sum(), objective=FORWARD)
    assert alone == 0 and not of_alone.any()
    with_it, _ = solved(student, teacher, mask=mask, objective=FORWARD)
    others = [0, 2, 3, 4, 5]
    without, _ = solved(student[others], teacher[others], mask=mask[others], objective=FORWARD)
    close(with_it, without)


@pytest.mark.parametrize("workspace_bytes", [1, 2**14, None])
def test_chunks_are_no_unit_of_the_mean(workspace_bytes: int | None) -> None:
    """meta-pytorch/torchtune#1885: the loss was averaged over chunks, whatever number of valid tokens each had."""
    hidden, weight = normal(300, 8, seed=3), normal(700, 8, seed=4, scale=0.5)
    teacher = normal(300, 700, seed=5)
    mask = torch.arange(300) % 100 < torch.arange(300) // 10  # the later the denser
    head = LMHead(weight)
    loss = entropy_aware_kl(
        hidden, teacher, student_head=head, mask=mask, workspace_bytes=workspace_bytes, objective=FORWARD
    ).loss
    of_token = plain(hidden.double() @ weight.double().t(), teacher).forward_kl
    close(loss, of_token[mask].mean())


def test_the_vocabulary_is_not_averaged_over() -> None:
    """haitongli/knowledge-distillation-pytorch#2: KLDivLoss divided by the classes, so that the gradient was V times
    too small; yuanli2333/Teacher-free-Knowledge-Distillation#41 and facebookresearch/deit#116 likewise."""
    student, teacher, _ = batch()
    loss, ours = solved(student, teacher, objective=FORWARD)
    leaf = student.requires_grad_()
    mean = torch.nn.functional.kl_div(
        leaf.double().log_softmax(-1), teacher.double().softmax(-1), reduction="none"
    ).sum() / (6 * 9)
    close(loss, mean)
    close(ours, gradient(mean, leaf))


def test_the_count_divides_once() -> None:
    """modelscope/easydistill#16: each token's loss was divided by the count, and their sum once more."""
    student, teacher, mask = batch()
    each, _ = solved(student, teacher, mask=mask, objective=FORWARD, reduction="none")
    total, _ = solved(student, teacher, mask=mask, objective=FORWARD, reduction="sum")
    mean, _ = solved(student, teacher, mask=mask, objective=FORWARD)
    truth = plain(student, teacher).forward_kl * mask
    close(each, truth)
    close(total, truth.sum())
    close(mean, truth.sum() / 23)


def test_the_gradient_is_that_of_the_mean_that_is_returned() -> None:
    """ROCm/aiter#5165: a chunked kernel returned the mean, and the gradient of the sum."""
    student, teacher, _ = batch()
    student, direction = student.double(), normal(6, 9, 31, seed=6).double()
    _, ours = solved(student, teacher.double(), 1.0, objective=FORWARD, workspace_bytes=1)
    step = 1e-5
    ends = [solved(student + s * direction, teacher.double(), objective=FORWARD)[0] for s in (step, -step)]
    close((ours * direction).sum(), (ends[0] - ends[1]) / (2 * step), 1e-6)


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_count_of_0_for_a_masked_batch(num_items: float | Tensor) -> None:
    """unslothai/unsloth-zoo#1286: all completions masked, 0 / 0, a NaN in every parameter; instructlab/training#547
    raised ZeroDivisionError there."""
    student, teacher, _ = batch()
    nothing = torch.zeros(6, 9, dtype=torch.bool)
    loss, ours = solved(student, teacher, mask=nothing, num_items=num_items, objective=FORWARD)
    assert loss == 0 and not ours.any()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_batch_cut_before_its_answers(hidden: bool, schedule: str) -> None:
    """NVIDIA-NeMo/Automodel#3796: three of four losses gave NaN for labels that are all −100, and a destroyed model;
    verl-project/verl#785, microsoft/LMOps#38 and nvidia-cosmos/cosmos-rl#155 met the same."""
    labels = torch.full((2, 7), -100)
    leaf = normal(2, 7, 8).requires_grad_()
    head = LMHead(normal(31, 8, seed=1).requires_grad_()) if hidden else None
    teacher = normal(2, 7, 31 if hidden else 8, seed=2)
    loss = entropy_aware_kl(leaf, teacher, student_head=head, labels=labels, schedule=schedule).loss
    loss.backward()
    assert loss == 0 and leaf.grad is not None and not leaf.grad.any()
    assert head is None or (head.weight.grad is not None and not head.weight.grad.any())


def test_a_trainer_that_counts_divides_and_this_loss_does_not_again() -> None:
    """MakazhanAlpamys/Soup#720: num_items_in_batch was taken and ignored, four equal micro-batches gave four times the
    gradient."""
    student, teacher, _ = batch()
    whole, of_whole = solved(student[:4], teacher[:4], objective=FORWARD)
    parts = [solved(student[i : i + 1], teacher[i : i + 1], num_items=4 * 9, objective=FORWARD) for i in range(4)]
    close(torch.stack([loss for loss, _ in parts]).sum(), whole)
    close(torch.cat([part for _, part in parts]), of_whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gradient_that_data_parallelism_scales(world_size: int) -> None:
    """unslothai/unsloth-zoo#434: the fused loss asserted that what comes from upstream is 1, and a data-parallel
    trainer multiplies by its ranks."""
    student, teacher, mask = batch()
    loss, once = solved(student, teacher, 1.0, mask=mask, objective=FORWARD)
    again, scaled = solved(student, teacher, float(world_size), mask=mask, objective=FORWARD)
    assert torch.equal(loss, again)
    close(scaled, world_size * once, 1e-6)
