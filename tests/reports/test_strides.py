"""Tensors whose elements do not lie one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved

REVERSE = Objective.reverse_kl()


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_sequence_first_model(side: str, backend: str) -> None:
    """NVIDIA/TransformerEngine#2734: [S, B, V] transposed to [B, S, V] was read with the stride of a dense row."""
    base = normal(4, 2, 8, seed=1), normal(4, 2, 8, seed=2)
    leaf = base[0].clone().requires_grad_()
    turned = [t.transpose(0, 1) for t in (leaf, base[1])]
    student, teacher = (
        t if side in (name, "both") else t.contiguous() for t, name in zip(turned, ("student", "teacher"), strict=True)
    )
    out = entropy_aware_kl(student, teacher, objective=REVERSE, backend=backend)
    exact = base[0].double().requires_grad_()
    truth = plain(exact.transpose(0, 1), base[1].transpose(0, 1)).reverse_kl
    close(out.reverse_kl, truth)
    close(gradient(out.loss, leaf), gradient(truth.mean(), exact))


@pytest.mark.parametrize("shape", ["expanded", "transposed", "stepped"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_upstream_gradient_has_strides_too(shape: str, hidden: bool) -> None:
    """ROCm/TransformerEngine#623: loss.sum() hands down one element expanded, read as if it were dense;
    NVIDIA/TransformerEngine#2402 met a transposed one, Dao-AILab/quack#126 asked for dense ones."""
    tokens, numbers = normal(6, 4, 8, seed=1), normal(6, 4, seed=3)
    weight = normal(31, 8, seed=2)
    teacher = normal(6, 4, 31 if hidden else 8, seed=4)
    upstream = {
        "expanded": torch.tensor(-1.3).expand(6, 4),
        "transposed": numbers.reshape(4, 6).t(),
        "stepped": normal(12, 8, seed=5)[::2, ::2],
    }[shape]
    leaf = tokens.clone().requires_grad_()
    head = LMHead(weight) if hidden else None
    loss = entropy_aware_kl(leaf, teacher, student_head=head, objective=REVERSE, reduction="none").loss
    exact = tokens.double().requires_grad_()
    truth = plain(exact @ weight.double().t() if hidden else exact, teacher).reverse_kl
    ours, expected = (torch.autograd.grad(of, x, upstream.to(of.dtype))[0] for of, x in ((loss, leaf), (truth, exact)))
    close(ours, expected)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other entry": lambda t: t[..., ::2],
    "the last token left out": lambda t: t[:, :-1],
    "one sequence for all": lambda t: t[:1].expand(5, -1, -1),
    "a slice of a padded vocabulary": lambda t: t[..., :33],
    "every other token": lambda t: t[:, 1::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_logits(view: str) -> None:
    """unslothai/unsloth#10713: sliced, transposed and expanded batches failed or were read with unit stride;
    vllm-project/vllm#42684 read the wrong row of logits[:, :V]."""
    of = VIEWS[view]
    bases = normal(5, 8, 40, seed=1), normal(5, 8, 40, seed=2)
    leaf = bases[0].clone().requires_grad_()
    out = entropy_aware_kl(of(leaf), of(bases[1]), objective=REVERSE)
    exact = bases[0].double().requires_grad_()
    truth = plain(of(exact), of(bases[1])).reverse_kl
    close(out.reverse_kl, truth)
    close(gradient(out.loss, leaf), gradient(truth.mean(), exact))


def test_labels_and_masks_with_strides() -> None:
    """unslothai/unsloth#10713: strided labels were read as dense ones."""
    student, teacher = normal(4, 5, 9, seed=1), normal(4, 5, 9, seed=2)
    labels = torch.randint(0, 2, (5, 8), generator=torch.Generator().manual_seed(0)) * 103 - 100
    views = labels[:, ::2].t(), (labels[:, 1::2] > -50).t()
    loss, _ = solved(student, teacher, labels=views[0], mask=views[1], objective=REVERSE, reduction="none")
    counted = (views[0] != -100) & views[1]
    assert 0 < counted.sum() < 20
    close(loss, plain(student, teacher).reverse_kl * counted)


def test_hidden_states_of_the_tokens_to_keep() -> None:
    """unslothai/unsloth-zoo#591: hidden_states[:, kept] could not be viewed as rows."""
    hidden, weight = normal(3, 9, 8, seed=1), normal(31, 8, seed=2)
    teacher = normal(3, 4, 31, seed=3)
    leaf = hidden.clone().requires_grad_()
    loss = entropy_aware_kl(leaf[:, 2:9:2], teacher, student_head=LMHead(weight), objective=REVERSE).loss
    exact = hidden.double().requires_grad_()
    truth = plain(exact[:, 2:9:2] @ weight.double().t(), teacher).reverse_kl.mean()
    close(loss, truth)
    close(gradient(loss, leaf), gradient(truth, exact))


@pytest.mark.parametrize("weight", ["transposed", "every other row"])
def test_a_head_that_is_a_view(weight: str) -> None:
    """unslothai/unsloth#10713's kind, for a weight that is stored the other way round, or a part of a larger one."""
    base = normal(8, 31, seed=2) if weight == "transposed" else normal(62, 8, seed=2)
    hidden, teacher = normal(7, 8, seed=1), normal(7, 31, seed=3)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = base.to(dtype).requires_grad_()
        view = leaf.t() if weight == "transposed" else leaf[::2]
        if dtype == torch.float32:
            loss = entropy_aware_kl(hidden, teacher, student_head=LMHead(view), objective=REVERSE).loss
        else:
            loss = plain(hidden.double() @ view.t(), teacher).reverse_kl.mean()
        grads.append(gradient(loss, leaf))
    close(grads[0], grads[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_further_apart_than_an_int32_can_say(inplace: bool, tmp_path: Path) -> None:
    """linkedin/Liger-Kernel#803, #1296, #1294, state-spaces/mamba#1015, vllm-project/vllm#39585: row · stride beyond
    2³¹ wrapped round. A file of 6 GB, of which four pages are written."""
    stride, rows = 2**30 + 32, 4  # the last row begins at 3·2³⁰ elements, which is below 0 in int32
    file = str(tmp_path / "logits")
    memory = torch.from_file(file, shared=True, size=stride * (rows - 1) + 64, dtype=torch.bfloat16)
    student = memory.as_strided((rows, 50), (stride, 1))
    student.copy_(normal(rows, 50, seed=1))
    teacher = normal(rows, 50, seed=2)
    exact = student.double().requires_grad_()
    truth = plain(exact, teacher).reverse_kl
    if inplace:
        logits = Attached.apply(student, torch.zeros(1, requires_grad=True))
        close(entropy_aware_kl(logits, teacher, objective=REVERSE, inplace=True).loss, truth.mean())
        close(student, torch.autograd.grad(truth.mean(), exact)[0], 2**-8)
    else:
        close(entropy_aware_kl(student, teacher, objective=REVERSE).reverse_kl, truth)


class Attached(torch.autograd.Function):
    """Makes a tensor part of a graph where it lies."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[None, None]:
        return None, None
