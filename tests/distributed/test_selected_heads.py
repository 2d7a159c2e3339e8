"""Entries of heads that are DTensors: the loss and the gradients are those of one process, however they are spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from eopd_kernels import LMHead, entropy_aware_kl, global_num_items
from tests.conftest import relative_error
from tests.distributed.processes import run_ranks
from tests.distributed.training import SEQUENCES, Batch, Student, V

IDS = torch.randperm(V, generator=torch.Generator().manual_seed(4))[:21]  # uneven over two ranks
IDS_T = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:21]
Gradients = dict[str, Tensor]


def selected(weight: Tensor, bias: Tensor | None) -> LMHead:
    return LMHead(weight, bias, softcap=3.0).select(IDS)


def step(model: Any, part: slice = slice(None), num_items: Tensor | None = None) -> float:
    batch = Batch()
    loss = entropy_aware_kl(
        model(batch.ids[part]),
        batch.teacher[part],
        student_head=selected(model.lm_head.weight, model.lm_head.bias),
        teacher_head=LMHead(batch.teacher_weight).select(IDS_T),
        mask=batch.mask[part],
        num_items=num_items,
    ).loss
    loss.backward()
    return loss.item()


def fsdp2(mesh: DeviceMesh) -> Gradients:
    model = Student(bias=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    size = SEQUENCES // dist.get_world_size()
    part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    step(model, part, global_num_items(Batch().mask[part]))
    for parameter in model.parameters():
        assert parameter.grad.placements == parameter.placements  # type: ignore[union-attr, attr-defined]
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def tensor_parallel(mesh: DeviceMesh, placement: Placement) -> tuple[float, Gradients] | str:
    model, batch = Student(bias=True), Batch()

    def spread(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_(tensor.requires_grad)

    weight, bias = spread(model.lm_head.weight), spread(model.lm_head.bias)
    head = selected(weight, bias)
    assert head.weight.placements == weight.placements and head.weight.shape == (21, 8)  # type: ignore[attr-defined]
    try:
        loss = entropy_aware_kl(
            model(batch.ids),
            batch.teacher,
            student_head=head,
            teacher_head=LMHead(spread(batch.teacher_weight)).select(IDS_T),
            mask=batch.mask,
            tensor_parallel_group=mesh,
            vocab_size=21,
        ).loss
    except ValueError as error:
        return str(error)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, tensor in (("lm_head.weight", weight), ("lm_head.bias", bias)):
        assert tensor.grad is not None and tensor.grad.placements == tensor.placements  # type: ignore[attr-defined]
        gradients[name] = tensor.grad.full_tensor()  # type: ignore[attr-defined]
    return loss.item(), gradients


def two_ranks() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        "fsdp2": fsdp2(mesh),
        "tensor parallel": tensor_parallel(mesh, Shard(0)),
        "replicated": tensor_parallel(mesh, Replicate()),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks)


@pytest.fixture(scope="module")
def expected() -> tuple[float, Gradients]:
    model = Student(bias=True)
    return step(model), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def check(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any() and relative_error(found[name], gradient) < 1e-5, name


def test_under_fsdp2_the_gradient_of_the_whole_weight_is_averaged(
    found: Any, expected: tuple[float, Gradients]
) -> None:
    for of_rank in found:
        check(of_rank["fsdp2"], expected[1])


def test_a_sharded_vocabulary_stays_sharded(found: Any, expected: tuple[float, Gradients]) -> None:
    for of_rank in found:
        loss, gradients = of_rank["tensor parallel"]
        assert loss == pytest.approx(expected[0], rel=1e-5)
        check(gradients, expected[1])


def test_a_whole_vocabulary_on_each_rank_of_a_group_is_refused_as_ever(found: Any) -> None:
    for of_rank in found:
        assert "student_head.weight must be sharded on its vocabulary, Shard(0)" in of_rank["replicated"]
