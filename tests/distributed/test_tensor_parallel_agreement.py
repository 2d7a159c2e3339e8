"""Ranks of a group that are called otherwise than others, or refuse a call alone: an error on each, and no waiting."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eopd_kernels import EntropyGate, LMHead, Objective, QuantileGate, Sampled, TopK, TopKTeacher, entropy_aware_kl
from eopd_kernels.distributed.exchange import digest
from eopd_kernels.row_math.statistics import RowStatistics
from eopd_kernels.testing import pretend
from tests.distributed.processes import run_ranks

N, V_R, D = 6, 5, 4  # tokens, entries of a rank, hidden size
TIMEOUT = 60.0  # of the group and of the test: a rank that waits for another is an error
OTHERWISE = "every rank of tensor_parallel_group must be called with the same tokens and options; ranks "
OPTIONS, NUMBERS = "leading=(6,)", "the options are the same, but not every number of a token"
Arguments = dict[str, Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hidden(**other: Any) -> Arguments:
    """Hidden states and heads, and everything that may be said of a token."""
    rank = dist.get_rank()
    head = {"bias": numbers(V_R, seed=3), **other.pop("of_student_head", {})}
    return {
        "student": numbers(N, D, seed=1).requires_grad_(),
        "teacher": numbers(N, D, seed=2),
        "student_head": LMHead(numbers(V_R, D, seed=rank), **head),
        "teacher_head": LMHead(numbers(V_R, D, seed=2 + rank), **other.pop("of_teacher_head", {})),
        "objective": Objective(gate=EntropyGate(0.5), reverse=Sampled(), forward=TopK(3)),
        "mask": torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0, 1.0]),
        "labels": torch.tensor([1, 2, 3, 4, -7, -100]),
        "token_ids": torch.tensor([1, 2, 9, 4, 5, 6]),
        "old_log_probs": -numbers(N, seed=5).abs(),
        "advantages": numbers(N, seed=6),
        "gate": torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0]),
        "reverse_weights": torch.ones(N),
        "forward_weights": torch.ones(N),
        **other,
    }


def logits(**other: Any) -> Arguments:
    rank = dist.get_rank()
    student = numbers(N, V_R, seed=1 + rank).requires_grad_() * 1
    return {"student": student, "teacher": numbers(N, V_R, seed=3 + rank), **other}


def served(**other: Any) -> Arguments:
    """A TopKTeacher in place of the teacher's hidden states."""
    tensors = {
        "ids": torch.tensor([[0, 7]]).repeat(N, 1),
        "log_probs": torch.full((N, 2), -1.0),
        "entropy": torch.ones(N),
        "valid": torch.ones(N, 2, dtype=torch.bool),
        "token_log_probs": torch.full((N,), -2.0),
    }
    return hidden(teacher=TopKTeacher(**tensors | other), teacher_head=None)


def changed(tensor: Tensor, *at: int, by: float = 1.0) -> Tensor:
    tensor = tensor.clone()
    tensor[at] += tensor.new_tensor(by)
    return tensor


def ever_open(statistics: RowStatistics) -> Tensor:
    return torch.ones_like(statistics.teacher_entropy)


def never_open(statistics: RowStatistics) -> Tensor:
    return torch.zeros_like(statistics.teacher_entropy)


def outcome(arguments: Arguments) -> str:
    """The loss or the error of one call."""
    try:
        out = entropy_aware_kl(**{"tensor_parallel_group": dist.group.WORLD, **arguments})
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"loss {out.loss.tolist()}"


def other_options() -> dict[str, tuple[Arguments, Arguments]]:
    """The arguments of rank 0 and of rank 1, by what differs."""
    given = hidden()["objective"]
    warm, plain = Objective(temperature=2.0), Objective()
    of_objective = {
        "gate": EntropyGate(0.6),
        "alpha": 2.0,
        "combine": "switch",
        "temperature": 2.0,
        "reverse": Sampled(0.3),
        "forward": TopK(4),
        "reverse_weight": 2.0,
        "cross_entropy": 0.5,
    }
    return {
        **{f"Objective.{n}": (hidden(), hidden(objective=replace(given, **{n: v}))) for n, v in of_objective.items()},
        "Objective.temperature_squared": (
            logits(objective=warm),
            logits(objective=replace(warm, temperature_squared=True)),
        ),
        "Objective.gate, its kind": (
            logits(objective=Objective(gate=QuantileGate())),
            logits(objective=Objective(gate=ever_open)),
        ),
        "Objective.gate, callable": (
            logits(objective=Objective(gate=never_open)),
            logits(objective=Objective(gate=ever_open)),
        ),
        "reduction": (logits(), logits(reduction="sum")),
        "schedule": (logits(), logits(schedule="recompute")),
        "inplace": (logits(), logits(inplace=True)),
        "workspace_bytes": (logits(), logits(workspace_bytes=1)),
        "gradient_filter": (hidden(), hidden(gradient_filter=0.01)),
        "wait_free": (hidden(), hidden(wait_free=True)),
        "partial_hidden_gradient": (hidden(), hidden(partial_hidden_gradient=True)),
        "student_head, scale": (hidden(), hidden(of_student_head={"scale": 2.0})),
        "student_head, softcap": (hidden(), hidden(of_student_head={"softcap": 2.0})),
        "student_head, bias": (hidden(), hidden(of_student_head={"bias": None})),
        "teacher_head, scale": (hidden(), hidden(of_teacher_head={"scale": 2.0})),
        "student, gradient": (hidden(), hidden(student=numbers(N, D))),
        "student, hidden size": (
            logits(student=numbers(N, 3), student_head=LMHead(numbers(V_R, 3)), objective=plain),
            logits(student=numbers(N, 4), student_head=LMHead(numbers(V_R, 4)), objective=plain),
        ),
        "teacher, kind": (hidden(), served()),
        "teacher, k": (
            served(),
            served(ids=torch.zeros(N, 1).long(), log_probs=-torch.ones(N, 1), valid=torch.ones(N, 1).bool()),
        ),
        "gate, given": (hidden(), hidden(gate=None)),
    }


def other_numbers() -> dict[str, tuple[Arguments, Arguments]]:
    """Likewise, where the options are the same."""
    given, teacher = hidden(), served()["teacher"]
    wide = logits(student=numbers(N, V_R).double())
    pairs = {
        "mask, one bit": (given, hidden(mask=changed(given["mask"], 0, by=2**-23))),
        "mask, two exchanged": (given, hidden(mask=given["mask"][[1, 0, 2, 3, 4, 5]])),
        "mask, two moved": (
            logits(mask=torch.tensor([0, 1, 1, 0, 0, 0])),
            logits(mask=torch.tensor([1, 0, 0, 1, 0, 0])),
        ),
        "mask, on one rank": (logits(), logits(mask=torch.tensor([1, 1, 1, 1, 1, 0]))),
        "labels": (given, hidden(labels=changed(given["labels"], 5))),
        "ignore_index": (given, hidden(ignore_index=4)),
        "num_items": (given, hidden(num_items=7)),
        "num_items, tensors": (hidden(num_items=torch.tensor(7)), hidden(num_items=torch.tensor(8))),
        "num_items, fp64": (wide | {"num_items": 3}, wide | {"num_items": 3 + 2**-40}),
        "teacher, valid": (served(), served(valid=torch.tensor([True, False]).repeat(N, 1))),
        "teacher, lower bound": (served(entropy=None), served(entropy=torch.full((N,), 0.5))),
    }
    for name in ("token_ids", "old_log_probs", "advantages", "gate", "reverse_weights", "forward_weights"):
        step = -1 if name == "old_log_probs" else 1
        pairs[name] = (given, hidden(**{name: changed(given[name], 1, by=step)}))
    for name in ("ids", "log_probs", "entropy", "token_log_probs"):
        by = 1 if name == "ids" else -0.5
        pairs[f"teacher, {name}"] = (served(), served(**{name: changed(teacher.tensors[name], 0, by=by)}))
    return pairs


def called_otherwise() -> dict[str, tuple[str, str]]:
    """What this rank says, and how the reason has to begin."""
    rank = dist.get_rank()
    return {
        name: (outcome(pair[rank]), reason)
        for pairs, reason in ((other_options(), OPTIONS), (other_numbers(), NUMBERS))
        for name, pair in pairs.items()
    }


def called_alike() -> list[str]:
    """What may differ: how the same weights are said, what is said of tokens without weight, and the backend."""
    rank = dist.get_rank()
    unused = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    mask = torch.tensor(unused)
    noise = torch.where(mask == 0, torch.tensor((float("nan"), 3.0)[rank]), torch.ones(N))
    return [
        outcome(logits(mask=(mask, mask.bool())[rank], backend=("auto", "torch")[rank])),
        outcome(logits(mask=(mask, None)[rank], labels=(None, (mask.long() - 1) * 100)[rank])),
        outcome(logits(mask=mask, reverse_weights=noise, gate=noise, num_items=(4, torch.tensor(4.0))[rank])),
    ]


def refused_by_rank_1() -> dict[str, str]:
    """Good arguments on rank 0; and a good call on both after each."""
    bad: dict[str, Arguments] = {
        "mask": hidden(mask=torch.ones(N, 2)),
        "token_ids": hidden(token_ids=torch.ones(N - 1).long()),
        "old_log_probs": hidden(old_log_probs=None),
        "gate": hidden(gate=[1.0] * N),
        "num_items": hidden(num_items=-1),
        "objective": hidden(objective="eopd"),
        "reduction": hidden(reduction="max"),
        "inplace": hidden(inplace=True),
        "gradient_filter": hidden(gradient_filter=2.0),
        "workspace_bytes": hidden(workspace_bytes=0),
        "vocab_size": hidden(vocab_size="all"),
        "student_head": hidden(student=numbers(N, D + 1)),
        "teacher": hidden(teacher=numbers(N, D).requires_grad_()),
        "backend": hidden(backend="none"),
    }
    found = {}
    for name, arguments in bad.items():
        found[name] = outcome(arguments if dist.get_rank() == 1 else hidden())
        assert (good := outcome(hidden())).startswith("loss "), (name, good)
    return found


def on_a_pretend() -> list[str]:
    """After a first call, whose numbers the host reads, the device's assertion is what is raised."""
    rank, given = dist.get_rank(), hidden()
    steps = [hidden(), hidden(mask=changed(given["mask"], 0)), given]
    steps += [hidden(mask=changed(given["mask"], rank)), hidden(mask=torch.ones(N, 1 + rank)) if rank else given, given]
    with pretend.gpu(), torch.no_grad():
        return [outcome(step) for step in steps]


def everything() -> dict[str, Any]:
    checks = (called_otherwise, called_alike, refused_by_rank_1, on_a_pretend)
    return {check.__name__: check() for check in checks}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, everything, timeout=TIMEOUT, interpreters=True)


def test_ranks_that_differ_in_anything_are_refused_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    wrong = []
    for rank, of_rank in enumerate(two_ranks):
        found = of_rank["called_otherwise"]
        for name, (said, reason) in found.items():
            if not said.startswith(
                f"ValueError: {OTHERWISE}[{1 - rank}] were called otherwise than this one, rank {rank}: {reason}"
            ):
                wrong.append(f"{name}, rank {rank}: {said[:300]}")
        tried = {name.split(",")[0] for name in found}
        # A backend changes nothing that another rank sees; vocab_size and the group have errors of their own.
        options = {*inspect.signature(entropy_aware_kl).parameters} - {"backend", "vocab_size", "tensor_parallel_group"}
        assert options - {"objective"} <= tried, options - tried
        assert {f"Objective.{field.name}" for field in fields(Objective)} <= tried
    assert not wrong, "\n".join(wrong)


def test_what_may_differ_between_ranks(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (of_rank["called_alike"] for of_rank in two_ranks)
    assert first == second
    assert all(said.startswith("loss ") for said in first), first


def test_a_rank_that_refuses_a_call_keeps_no_other_waiting(two_ranks: list[dict[str, Any]]) -> None:
    waiting, refusing = (of_rank["refused_by_rank_1"] for of_rank in two_ranks)
    for name, said in refusing.items():
        assert said.split(": ")[0] in ("ValueError", "TypeError") and name in said, (name, said)
        assert "tensor_parallel_group" not in said, (name, said)
    says = "ValueError: ranks [1] of tensor_parallel_group refused this call: see the error of each"
    assert waiting == dict.fromkeys(refusing, says)


def test_a_gpu_asserts_what_a_cpu_reads(two_ranks: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(two_ranks):
        first, second, third, other, refused, last = of_rank["on_a_pretend"]
        assert first.startswith("loss ") and second.startswith("loss ") and first != second
        assert first == third == last
        assert other.startswith("RuntimeError: "), other
        assert refused.startswith("ValueError: mask must" if rank == 1 else "RuntimeError: "), refused


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_the_digest_of_numbers_sees_every_bit_and_its_place(count: int) -> None:
    found = set()
    given = torch.arange(count)
    variants = [given, *(given.clone().index_fill_(0, torch.tensor([i]), -7) for i in range(min(count, 50)))]
    variants += [given ^ (1 << bit) for bit in range(63) if count]
    variants += [given.roll(i) for i in range(1, min(count, 50))]
    for variant in variants:
        value = digest([variant, None])
        assert value.shape == (1,) and value.dtype == torch.int64 and 0 <= int(value) < 2**32
        assert torch.equal(value, digest([variant.clone()]))
        found.add(int(value))
    assert len(found) == len(variants)
