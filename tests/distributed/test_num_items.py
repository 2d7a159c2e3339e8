"""However tokens are spread, over ranks and micro-batches: loss and gradients of one process on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eopd_kernels import global_num_items
from eopd_kernels.testing import messages
from tests.conftest import relative_error
from tests.distributed.processes import run_ranks
from tests.distributed.traffic import Traffic
from tests.distributed.training import LENGTH, SEQUENCES, Batch, Student, gradients, loss_of

RANKS = 2
Found = tuple[Tensor, dict[str, Tensor]]  # loss and gradients
Part = tuple[slice, slice]


def single() -> Found:
    student = Student()
    loss = loss_of(student, Batch())
    loss.backward()
    return loss.detach(), gradients(student)


def my_sequences(micro_batches: int) -> list[Part]:
    """Rank 0 has the first half of the sequences, rank 1 the other; each in so many micro-batches."""
    size = SEQUENCES // RANKS // micro_batches
    start = dist.get_rank() * SEQUENCES // RANKS
    return [(slice(start + i * size, start + (i + 1) * size), slice(None)) for i in range(micro_batches)]


def averaged(losses: list[Tensor]) -> Tensor:
    total = torch.stack([loss.detach() for loss in losses]).sum()
    dist.all_reduce(total)
    return total / RANKS


def data_parallel(micro_batches: int) -> Found:
    model = DistributedDataParallel(Student())
    batch, parts = Batch(), my_sequences(micro_batches)
    num_items = global_num_items([batch.mask[part] for part in parts])
    losses = []
    for step, part in enumerate(parts):
        model.require_backward_grad_sync = step == len(parts) - 1
        hidden = model(batch.ids[part])
        losses.append(loss_of(Precomputed(model.module, hidden), batch, part, num_items))
        losses[-1].backward()
    return averaged(losses), gradients(model)


class Precomputed:
    """A student whose hidden states are there already, because a wrapper's forward has to compute them."""

    def __init__(self, student: Any, hidden: Tensor) -> None:
        self.lm_head = student.lm_head
        self.hidden = hidden

    def __call__(self, ids: Tensor) -> Tensor:
        return self.hidden


def fully_sharded(micro_batches: int) -> Found:
    model = Student()
    fully_shard(model, reshard_after_forward=True)
    batch, parts = Batch(), my_sequences(micro_batches)
    num_items = global_num_items([batch.mask[part] for part in parts])
    losses = []
    for part in parts:
        losses.append(loss_of(model, batch, part, num_items))
        losses[-1].backward()
    return averaged(losses), {name: g.full_tensor() for name, g in gradients(model).items()}  # type: ignore[attr-defined]


def context_parallel() -> Found:
    """Each rank has half of every sequence; gradients are summed."""
    student, batch = Student(), Batch()
    half = LENGTH // RANKS
    part = (slice(None), slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))
    loss = loss_of(student, batch, part, global_num_items(batch.mask[part], averaged_over=1))
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = gradients(student)
    for gradient in found.values():
        dist.all_reduce(gradient)
    return total, found


def accumulated() -> Found:
    """One process: a group of its own, four micro-batches, one of them without a valid token."""
    student, batch = Student(), Batch()
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    parts = [(slice(i, i + 2), slice(None)) for i in range(0, SEQUENCES, 2)]
    num_items = global_num_items([batch.mask[part] for part in parts], group=groups[dist.get_rank()])
    losses = [loss_of(student, batch, part, num_items) for part in parts]
    sum(losses).backward()  # type: ignore[union-attr]
    return torch.stack(losses).sum().detach(), gradients(student)


def nothing_on_rank_1() -> Found:
    """All valid tokens of the batch are on rank 0."""
    model, batch = DistributedDataParallel(Student()), Batch()
    batch.mask[SEQUENCES // RANKS :] = False
    (part,) = my_sequences(1)
    hidden = model(batch.ids[part])
    loss = loss_of(Precomputed(model.module, hidden), batch, part, global_num_items(batch.mask[part]))
    loss.backward()
    return averaged([loss]), gradients(model)


def mixed_meshes() -> tuple[float, dict[str, int]]:
    """Counted over all ranks, averaged over the data-parallel ones only."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "cp"))
    with Traffic() as traffic:
        count = global_num_items(torch.ones(3 + dist.get_rank()), averaged_over=mesh["dp"].size())
    return float(count), dict(traffic.bytes)


def everything() -> dict[str, Any]:
    return {
        "accumulation": accumulated(),
        "DDP": data_parallel(1),
        "DDP and accumulation": data_parallel(2),
        "FSDP2": fully_sharded(1),
        "FSDP2 and accumulation": fully_sharded(2),
        "context parallelism": context_parallel(),
        "nothing on rank 1": nothing_on_rank_1(),
        "count": mixed_meshes(),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(RANKS, everything)


CASES = ["accumulation", "DDP", "DDP and accumulation", "FSDP2", "FSDP2 and accumulation", "context parallelism"]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_gradients_are_those_of_one_process(case: str, found: list[dict[str, Any]]) -> None:
    loss, expected = single()
    for of_rank in found:
        mine, gradients_found = of_rank[case]
        assert relative_error(mine, loss) < 1e-6
        assert gradients_found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(gradients_found[name], gradient) < 2e-6, name


def test_a_rank_without_a_valid_token(found: list[dict[str, Any]]) -> None:
    student, batch = Student(), Batch()
    loss = loss_of(student, batch, (slice(0, SEQUENCES // RANKS), slice(None)))
    loss.backward()
    for of_rank in found:
        mine, gradients_found = of_rank["nothing on rank 1"]
        assert relative_error(mine, loss) < 1e-6
        for name, gradient in gradients(student).items():
            assert relative_error(gradients_found[name], gradient) < 2e-6, name


def test_the_mean_of_means_is_another_number() -> None:
    """The batch is uneven enough to tell."""
    student, batch = Student(), Batch()
    halves = [loss_of(student, batch, (slice(i, i + 4), slice(None))) for i in (0, 4)]
    assert relative_error((halves[0] + halves[1]) / 2, single()[0]) > 1e-2


def test_one_number_travels(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["count"] == (7.0, {"allreduce_": messages.COUNT_BYTES})


def test_without_a_process_group_it_counts() -> None:
    assert float(global_num_items([torch.tensor([1, 0, 2]), torch.tensor([True])])) == 3
    with pytest.raises(TypeError, match="masks must be a tensor or a sequence of at least one"):
        global_num_items([])
    with pytest.raises(ValueError, match="averaged_over must be at least 1, got 0"):
        global_num_items(torch.ones(2), averaged_over=0)
