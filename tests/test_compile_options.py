"""torch.compile(fullgraph=True) with every option once, and tensors that have shapes but no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eopd_kernels import (
    EntropyAwareKL,
    EntropyGate,
    LMHead,
    Objective,
    QuantileGate,
    Sampled,
    Skewed,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
)
from eopd_kernels.rows import BACKENDS
from tests.conftest import make_case

LEADING, V = (2, 5), 67
IDS = torch.arange(10).view(LEADING)
NUMBERS = torch.linspace(0.1, 1, 10).view(LEADING)
SAMPLED: dict[str, Any] = {"token_ids": IDS, "old_log_probs": -4 * NUMBERS}

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "mask": {"mask": NUMBERS > 0.4},
    "a mask of numbers": {"mask": NUMBERS},
    "labels": {"labels": torch.where(IDS % 3 == 0, -100, IDS)},
    "narrow labels": {"labels": IDS.to(torch.uint8), "ignore_index": 3},
    "num_items": {"num_items": 7},
    "num_items, a float": {"num_items": 7.5},
    "num_items, a tensor": {"num_items": torch.tensor(7)},
    "vocab_size": {"vocab_size": 60},
    "objective": {"objective": Objective(gate=EntropyGate(2.0, sharpness=3.0), alpha=0.7, combine="blend")},
    "temperatures": {"objective": Objective(temperature=(2.0, 0.5))},
    "temperature squared": {"objective": Objective(temperature=2.0, temperature_squared=True)},
    "jsd": {"objective": Objective.jsd(0.3)},
    "skewed": {"objective": Objective(reverse=Skewed(0.1), forward=Skewed(0.3), reverse_weight=0.5)},
    "quantile": {"objective": Objective(gate=QuantileGate(0.5, of="student"))},
    "forward": {"objective": Objective(reverse="none")},
    "sampled": {"objective": Objective(reverse=Sampled(0.1, 0.2), forward=TopK(5)), **SAMPLED},
    "token_ids": {"token_ids": IDS},
    "advantages": {
        "objective": Objective(reverse=Sampled(0.1, 0.2, clip_most=1.5)),
        "advantages": 2 * NUMBERS - 1.1,
        **SAMPLED,
    },
    "tail": {"objective": Objective(forward=TopK(5, teacher="raw", tail=True))},
    "reverse top k": {"objective": Objective(reverse=TopK(5, teacher="raw", of="student"), forward=TopK(3))},
    "cross-entropy": {"objective": Objective(cross_entropy=0.5), "labels": torch.where(IDS % 3 == 0, -100, IDS)},
    "gate": {"gate": NUMBERS},
    "reverse_weights": {"reverse_weights": NUMBERS},
    "forward_weights": {"forward_weights": NUMBERS},
    "sum": {"reduction": "sum"},
    "each token": {"reduction": "none"},
    "chunked": {"schedule": "chunked"},
    "recompute": {"schedule": "recompute"},
    "workspace_bytes": {"workspace_bytes": 2**14},
    **{f"backend={name}": {"backend": name} for name in BACKENDS},
    "gradient_filter": {"gradient_filter": 2**-10},
    "wait_free": {"wait_free": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(kind: str) -> list[Tensor]:
    case = make_case(leading=LEADING, vocab_size=V, student=kind, teacher=kind)
    heads = [head.weight for head in (case.student_head, case.teacher_head) if head is not None]
    return [case.student, case.teacher, *heads]


def loss_with(options: dict[str, Any]) -> Callable[..., Tensor]:
    def function(student: Tensor, teacher: Tensor, *weights: Tensor) -> Tensor:
        heads: dict[str, Any] = {}
        if weights:
            heads = {"student_head": LMHead(weights[0]), "teacher_head": LMHead(weights[1])}
        return entropy_aware_kl(student, teacher, **heads, **options).loss

    return function


def compiled_equals_eager(function: Callable[..., Tensor], given: list[Tensor]) -> None:
    leaves = [t for t in given if t.requires_grad]
    outcomes = []
    for run in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        loss = run(*given)
        outcomes.append([loss, *torch.autograd.grad(loss.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


# Of hidden states every option, of logits those that have a way of their own for them.
OF_LOGITS = ("none", "mask", "each token", "recompute", "vocab_size", "backend=cpu", "backend=torch")
CALLS = [*((name, "hidden") for name in OPTIONS), *((name, "logits") for name in OF_LOGITS)]


@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_in_one_graph(name: str, kind: str) -> None:
    options = OPTIONS[name]
    if "backend" in options and (why := BACKENDS[options["backend"]].unavailable()) is not None:
        pytest.skip(f"{name} is not available: {why}")
    compiled_equals_eager(loss_with(options), arguments(kind))


def test_a_served_teacher_in_one_graph() -> None:
    ids, log_probs = IDS.unsqueeze(-1) + torch.arange(3), torch.full((*LEADING, 3), -1.5)
    objective = Objective(reverse="sampled", forward=TopK(3))

    def function(student: Tensor, weight: Tensor) -> Tensor:
        teacher = TopKTeacher(ids, log_probs, token_log_probs=-NUMBERS)
        return entropy_aware_kl(student, teacher, student_head=LMHead(weight), objective=objective, **SAMPLED).loss

    student, _, weight, _ = arguments("hidden")
    compiled_equals_eager(function, [student, weight])


def test_what_only_the_numbers_show_is_refused_when_the_graph_runs() -> None:
    student, teacher = arguments("logits")
    compiled = torch.compile(EntropyAwareKL.apply, backend="aot_eager", fullgraph=True)
    assert compiled(student, teacher, num_items=torch.tensor(3.0)).isfinite()
    with pytest.raises(ValueError, match="num_items must be finite and at least 0"):
        compiled(student, teacher, num_items=torch.tensor(-3.0))
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        torch.compile(EntropyAwareKL.apply, backend="aot_eager", fullgraph=True)(student, teacher, backend="tpu")


@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_fake_tensors_go_forward_and_backward(name: str, kind: str) -> None:
    """Shapes, dtypes and devices are right, and nobody asks for a number: what tracers and planners of memory need."""
    options = OPTIONS[name]
    if "backend" in options and (why := BACKENDS[options["backend"]].unavailable()) is not None:
        pytest.skip(f"{name} is not available: {why}")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(t) for t in arguments(kind)]
        fake = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in options.items()}
        leaves = [t for t in given if t.requires_grad]
        loss = loss_with(fake)(*given)
        assert loss.shape == (LEADING if options.get("reduction") == "none" else ())
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_count_on_the_host_beside_tensors_elsewhere(where: str) -> None:
    """transformers hands its count out so where layers are spread over devices: nothing waits for it."""
    student = torch.zeros(2, 3, 8, device=where, requires_grad=True)
    teacher = torch.zeros(2, 3, 8, device=where)
    loss = entropy_aware_kl(student, teacher, num_items=torch.tensor(7), backend="torch").loss
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.device.type == gradient.device.type == where
    with pytest.raises(ValueError, match="num_items must be finite and at least 0"):
        entropy_aware_kl(student, teacher, num_items=torch.tensor(-7), backend="torch")
