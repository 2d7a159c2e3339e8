"""Heads that are DTensors: one gather per call, and two steps of training are those of one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from eopd_kernels import LMHead, entropy_aware_kl, global_num_items
from eopd_kernels.testing import messages
from tests.conftest import relative_error
from tests.distributed.processes import run_ranks
from tests.distributed.traffic import Traffic
from tests.distributed.training import D_T, SEQUENCES, Batch, D, Student, V, loss_of

Parameters = dict[str, Tensor]
MODELS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}, "bias": {"bias": True}}
VOCAB_SIZE = 1501  # three slices at least, and an uneven shard
SCHEDULES = ("chunked", "recompute")


def trained(model: Student, parts: list[tuple[slice, slice]], mesh: DeviceMesh | None, schedule: str) -> Parameters:
    """Two steps of AdamW, on each rank with its part of the batch; the whole parameters afterwards."""
    batch = Batch()
    if mesh is not None:
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    part = parts[0 if mesh is None else dist.get_rank()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        num_items = None if mesh is None else global_num_items(batch.mask[part])
        (1.7 * loss_of(model, batch, part, num_items, schedule=schedule)).backward()
        for parameter in model.parameters():
            assert mesh is None or parameter.grad.placements == parameter.placements  # type: ignore[union-attr, attr-defined]
        optimizer.step()
    return {n: p.detach() if mesh is None else p.detach().full_tensor() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def by_rank(ranks: int) -> list[tuple[slice, slice]]:
    size = SEQUENCES // ranks
    return [(slice(i * size, (i + 1) * size), slice(None)) for i in range(ranks)]


class WithLoss(Student):
    """The loss in the forward of the wrapped module: there its parameters are whole, and nothing is gathered twice."""

    def forward(self, part: Any, num_items: Any = None) -> Tensor:
        if isinstance(part, Tensor):
            return super().forward(part)
        return loss_of(_Inner(self), Batch(), part, num_items)


class _Inner:
    def __init__(self, model: WithLoss) -> None:
        self.model, self.lm_head = model, model.lm_head

    def __call__(self, ids: Tensor) -> Tensor:
        return Student.forward(self.model, ids)


def inside_forward() -> tuple[Parameters, dict[str, int]]:
    model = WithLoss()
    fully_shard(model)
    part = by_rank(2)[dist.get_rank()]
    num_items = global_num_items(Batch().mask[part])
    with Traffic() as traffic:
        model(part, num_items).backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters()}, dict(traffic.calls)  # type: ignore[union-attr]


def collectives(schedule: str, bias: bool, teacher: bool, workspace_bytes: int = 1) -> dict[str, tuple[int, int]]:
    """Calls and bytes of one call of the loss and its backward: many chunks, or many slices."""
    mesh = init_device_mesh("cpu", (2,))

    def sharded(*shape: int, grad: bool) -> Tensor:
        whole = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
        return distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_(grad)

    student_head = LMHead(sharded(VOCAB_SIZE, D, grad=True), sharded(VOCAB_SIZE, grad=True) if bias else None)
    weight = sharded(VOCAB_SIZE, D_T, grad=False)
    teacher_head = LMHead(weight if teacher else weight.full_tensor())  # type: ignore[attr-defined]
    hidden = torch.randn(100, D, requires_grad=True)
    with Traffic() as traffic:
        out = entropy_aware_kl(
            hidden,
            torch.randn(100, D_T),
            student_head=student_head,
            teacher_head=teacher_head,
            schedule=schedule,
            workspace_bytes=workspace_bytes,
        )
        out.loss.backward()
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    return {name: (traffic.calls[name], traffic.bytes[name]) for name in names if traffic.calls[name]}


def from_model() -> tuple[bool, list[str]]:
    """A sharded model's own parameter is taken as it is; what else is distributed is refused."""
    model = Student()
    model.config = SimpleNamespace(vocab_size=V)  # type: ignore[assignment]
    model.get_output_embeddings = lambda: model.lm_head  # type: ignore[assignment]
    fully_shard(model)
    head = LMHead.from_model(model)
    says = []
    mesh = init_device_mesh("cpu", (2,))
    hidden = distribute_tensor(torch.randn(4, D), mesh, [Shard(0)])
    whole = LMHead(torch.randn(V, D))
    teacher = LMHead(distribute_tensor(torch.randn(V, D), mesh, [Shard(0)]).requires_grad_())
    with Traffic() as traffic:
        for student, teacher_head in ((hidden, whole), (torch.randn(4, D), teacher)):
            try:
                entropy_aware_kl(student, torch.randn(4, D), student_head=head, teacher_head=teacher_head)
            except (TypeError, ValueError) as error:
                says.append(str(error))
    assert not traffic.calls, traffic.calls
    return head.weight is model.lm_head.weight, says


def two_ranks() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        "trained": {
            (name, schedule): trained(Student(**options), by_rank(2), mesh, schedule)
            for name, options in MODELS.items()
            for schedule in SCHEDULES
        },
        "inside forward": inside_forward(),
        "collectives": {
            (s, bias, teacher): collectives(s, bias, teacher)
            for s in SCHEDULES
            for bias in (False, True)
            for teacher in (False, True)
        },
        "from_model": from_model(),
    }


def hybrid() -> Parameters:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return trained(Student(bias=True), by_rank(4), mesh, "chunked")


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks)


EVERYTHING = [(slice(None), slice(None))]


def check(found: Parameters, model: nn.Module, expected: Parameters) -> None:
    assert found.keys() == expected.keys()
    before = dict(model.named_parameters())
    for name, parameter in expected.items():
        assert relative_error(parameter, before[name]) > 1e-2, name  # it moved
        assert relative_error(found[name], parameter) < 1e-5, name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_fsdp2_are_those_of_one_process(name: str, schedule: str, found: list[dict[str, Any]]) -> None:
    expected = trained(Student(**MODELS[name]), EVERYTHING, None, schedule)
    for of_rank in found:
        check(of_rank["trained"][name, schedule], Student(**MODELS[name]), expected)


def test_two_steps_of_hybrid_sharding_are_those_of_one_process() -> None:
    expected = trained(Student(bias=True), EVERYTHING, None, "chunked")
    for parameters in run_ranks(4, hybrid):
        check(parameters, Student(bias=True), expected)


def test_inside_the_forward_nothing_is_gathered_by_the_loss(found: list[dict[str, Any]]) -> None:
    student = Student()
    loss_of(student, Batch()).backward()
    for of_rank in found:
        parameters, calls = of_rank["inside forward"]
        assert sum(calls.values()) - calls.get("_wrap_tensor_autograd", 0) == 2, calls  # FSDP's own gather and scatter
        for name, parameter in student.named_parameters():
            assert relative_error(parameters[name], parameter.grad) < 2e-6  # type: ignore[arg-type]


def test_each_tensor_is_gathered_once_whatever_the_chunks(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        for (_, bias, teacher), calls in of_rank["collectives"].items():
            sent = [(VOCAB_SIZE, D), *([(VOCAB_SIZE, 1)] if bias else []), *([(VOCAB_SIZE, D_T)] if teacher else [])]
            gathers = sum(messages.gather_bytes(*shape, itemsize=4, ranks=2) for shape in sent)
            scatters = sum(messages.scatter_bytes(*shape, itemsize=4, ranks=2) for shape in sent[: 1 + bias])
            assert calls["all_gather_into_tensor"] == (1 + bias + teacher, gathers)
            assert calls["reduce_scatter_tensor"] == (1 + bias, scatters)
            assert "all_reduce" not in calls


def test_from_model_takes_the_sharded_parameter_and_refusals_send_nothing(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        is_parameter, says = of_rank["from_model"]
        assert is_parameter
        assert len(says) == 2
        assert says[0].startswith("student must be an ordinary tensor with this rank's tokens, got a DTensor")
        assert says[1].startswith("teacher_head.weight requires grad")


def partitioned() -> nn.Parameter:
    """As DeepSpeed's ZeRO-3 leaves a parameter outside of its module's forward: empty, its shape an attribute."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 7, torch.Size([V, D])  # type: ignore[attr-defined]
    return parameter


def test_a_parameter_that_zero_3_has_partitioned_is_refused_with_the_recipe() -> None:
    says = r"is partitioned by DeepSpeed ZeRO-3: \(37, 8\), empty here; call the loss in the forward of the module"
    with pytest.raises(ValueError, match=f"LMHead.weight {says}"):
        LMHead(partitioned())
    head = LMHead(torch.randn(V, D))
    head.weight = partitioned()  # partitioned after the head was built
    with pytest.raises(ValueError, match=f"student_head.weight {says}"):
        entropy_aware_kl(torch.randn(4, D), torch.randn(4, V), student_head=head)
    layer = nn.Linear(D, V)
    layer.weight = partitioned()
    model: Any = nn.Module()
    model.lm_head, model.config, model.get_output_embeddings = layer, SimpleNamespace(), lambda: layer
    with pytest.raises(ValueError, match=f"the weight of Module's output layer {says}"):
        LMHead.from_model(model)
    gathered = partitioned()
    gathered.data = torch.randn(V, D)  # as inside the forward
    entropy_aware_kl(torch.randn(4, D), torch.randn(4, V), student_head=LMHead(gathered)).loss.backward()
    assert gathered.grad is not None and gathered.grad.shape == (V, D)
