"""torch.compile: one graph, at most one more to become dynamic, and what comes out is what eager gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from eopd_kernels import (
    EntropyAwareKL,
    EntropyAwareKLLoss,
    EntropyAwareKLOutput,
    EntropyGate,
    LMHead,
    Objective,
    QuantileGate,
    TopKTeacher,
    compiled,
    entropy_aware_kl,
)
from tests.conftest import Case, make_case, relative_error, upstream_for

PER_TOKEN = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate", "reverse_half", "forward_half")
OF_TOKENS = ("student_log_probs", "teacher_log_probs")
PAPER = Objective.eopd_paper()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case_of(n: int, **options: Any) -> Case:
    return make_case(leading=(2, n), vocab_size=67, **options)


def tensors(case: Case) -> list[Tensor]:
    """What a compiled function is given: a graph must not hold it."""
    heads = (case.student_head, case.teacher_head)
    parts = [case.student, case.teacher, *(None if h is None else h.weight for h in heads), case.mask]
    return [t for t in parts if t is not None]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def agree(a: Any, b: Any, leaves: list[Tensor], exactly: Callable[[Tensor, Tensor], bool] = same) -> None:
    """Loss, gradient under an upstream that is not 1, and every per-token figure."""
    if isinstance(a, EntropyAwareKLOutput):
        for name in PER_TOKEN if b.student_log_probs is None else (*PER_TOKEN, *OF_TOKENS):
            assert exactly(getattr(a, name), getattr(b, name)), name
        a, b = a.loss, b.loss
    assert exactly(a.detach(), b.detach())
    assert a.requires_grad == b.requires_grad == bool(leaves)
    if leaves:
        gradients = [torch.autograd.grad(loss, leaves, upstream_for(loss)) for loss in (a, b)]
        assert all(exactly(x, y) for x, y in zip(*gradients, strict=True))


def check(function: Callable[..., Any], given: Callable[[int], list[Any]], graphs: int = 2, **options: Any) -> None:
    """``function`` of what ``given`` makes of a size: compiled as a whole it is what it was, in so many graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(function, backend=counter, fullgraph=True, **options)
    for n in (5, 6, 8):
        arguments = given(n)
        leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
        agree(whole(*arguments), function(*arguments), leaves)
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("kind", "masked", "schedule", "reduction"),
    [
        ("logits", False, "chunked", "mean"),
        ("logits", True, "recompute", "none"),
        ("hidden", True, "chunked", "mean"),
        ("hidden", False, "recompute", "sum"),
    ],
)
def test_one_graph_for_every_batch_size(kind: str, masked: bool, schedule: str, reduction: str) -> None:
    def function(student: Tensor, teacher: Tensor, *rest: Tensor) -> EntropyAwareKLOutput:
        mask = rest[-1] if masked else None
        heads: dict[str, Any] = {}
        if kind == "hidden":
            heads = {"student_head": LMHead(rest[0]), "teacher_head": LMHead(rest[1])}
        return entropy_aware_kl(
            student, teacher, **heads, mask=mask, schedule=schedule, reduction=reduction, objective=Objective(alpha=0.7)
        )

    check(function, lambda n: tensors(case_of(n, student=kind, teacher=kind, masked=masked)))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_token_log_probs_are_outputs_of_the_op(schedule: str) -> None:
    def function(student: Tensor, teacher: Tensor, token_ids: Tensor) -> EntropyAwareKLOutput:
        return entropy_aware_kl(student, teacher, token_ids=token_ids, schedule=schedule)

    def given(n: int) -> list[Tensor]:
        return [*tensors(case_of(n, student="logits", teacher="logits")), torch.arange(2 * n).view(2, n)]

    check(function, given)


def test_a_size_that_is_marked_dynamic_takes_one_graph() -> None:
    def given(n: int) -> list[Tensor]:
        arguments = tensors(case_of(n, student="logits", teacher="logits"))
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 1)
        return arguments

    check(lambda student, teacher: entropy_aware_kl(student, teacher), given, graphs=1)


@pytest.mark.parametrize("door", ["apply", "bound apply", "module"])
def test_every_door(door: str) -> None:
    module = EntropyAwareKLLoss(Objective(gate=EntropyGate(2.0), alpha=0.3))
    functions: dict[str, Callable[..., Any]] = {
        "apply": lambda s, t, w, v: EntropyAwareKL.apply(s, t, w, v, objective=Objective(alpha=0.5)),
        "bound apply": EntropyAwareKL.apply,
        "module": lambda s, t, w, v: module(s, t, student_head=LMHead(w, softcap=9.0), teacher_head=LMHead(v)),
    }
    check(functions[door], lambda n: tensors(case_of(n)))


@pytest.mark.parametrize("num_items", [int, float, torch.tensor])
def test_another_count_is_no_other_graph(num_items: Callable[[int], Any]) -> None:
    def function(student: Tensor, teacher: Tensor, count: Any) -> EntropyAwareKLOutput:
        return entropy_aware_kl(student, teacher, num_items=count)

    def given(n: int) -> list[Any]:
        return [*tensors(case_of(n, student="logits", teacher="logits")), num_items(n + 3)]

    check(function, given)


@pytest.mark.parametrize(
    ("served", "kind", "schedule"),
    [(True, "hidden", "chunked"), (False, "logits", "chunked"), (False, "hidden", "recompute")],
)
def test_the_papers_objective(served: bool, kind: str, schedule: str) -> None:
    def given(n: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(n)
        case = case_of(n, student=kind, teacher="logits")
        ids = torch.randint(0, 67, (2, n), generator=generator)
        numbers = [-torch.rand(2, n, generator=generator) for _ in range(2)]
        log_probs, top = case.teacher.log_softmax(-1).topk(4)
        head = [] if case.student_head is None else [case.student_head.weight]
        return [case.student, case.teacher, ids, *numbers, log_probs, top, *head]

    def function(
        s: Tensor, t: Any, ids: Tensor, old: Tensor, q: Tensor, log_probs: Tensor, top: Tensor, *w: Any
    ) -> Any:
        teacher = TopKTeacher(top, log_probs, token_log_probs=q) if served else t
        head = LMHead(*w) if w else None
        objective = PAPER if schedule == "chunked" else Objective.eopd_paper()
        return entropy_aware_kl(
            s, teacher, student_head=head, token_ids=ids, old_log_probs=old, objective=objective, schedule=schedule
        )

    check(function, given)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(gate=QuantileGate(0.5)),
        Objective(gate=EntropyGate(0.3, of="student", normalized=True, sharpness=3.0), combine="blend", alpha=0.5),
        Objective.jsd(0.3),
        Objective(reverse="none", temperature=(1.0, 2.0)),
        Objective.forward_kl(2.0),
    ],
    ids=str,
)
def test_other_objectives(objective: Objective) -> None:
    def function(s: Tensor, t: Tensor, w: Tensor, v: Tensor, objective: Objective) -> EntropyAwareKLOutput:
        return entropy_aware_kl(s, t, student_head=LMHead(w), teacher_head=LMHead(v), objective=objective)

    check(function, lambda n: [*tensors(case_of(n)), objective])


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_gates_found_first_in_a_recomputed_backward(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reverse half tokens whose gate is shut are left out, on both ways."""

    def function(s: Tensor, t: Tensor, w: Tensor, v: Tensor, gate: Tensor) -> EntropyAwareKLOutput:
        heads: dict[str, Any] = {"student_head": LMHead(w), "teacher_head": LMHead(v)}
        return entropy_aware_kl(s, t, **heads, gate=gate, objective=Objective(reverse="none"), schedule=schedule)

    def given(n: int) -> list[Tensor]:
        return [*tensors(case_of(n)), torch.arange(2 * n).view(2, n) % 2]

    check(function, given)
    rows, grad_hidden = [], LMHead.grad_hidden

    def counted(head: LMHead, gradient: Tensor, *rest: Any, **more: Any) -> None:
        rows.append(len(gradient))
        grad_hidden(head, gradient, *rest, **more)

    monkeypatch.setattr(LMHead, "grad_hidden", counted)
    torch.compile(function, backend="aot_eager", fullgraph=True)(*given(8)).loss.backward()
    assert sum(rows) == 8  # of 16


@pytest.mark.parametrize(
    ("kind", "dtype"), [("logits", torch.float16), ("hidden", torch.bfloat16), ("hidden", torch.float64)], ids=str
)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    def function(student: Tensor, teacher: Tensor, *weights: Tensor) -> Tensor:
        return EntropyAwareKL.apply(student, teacher, *weights)

    check(function, lambda n: tensors(case_of(n, student=kind, teacher=kind, dtype=dtype)))


def test_dynamic_throughout() -> None:
    """Numbers of an objective that come from outside are symbolic then, and become constants."""

    def function(student: Tensor, teacher: Tensor, entries: int, objective: Objective) -> EntropyAwareKLOutput:
        return entropy_aware_kl(student, teacher, vocab_size=entries, objective=objective)

    def given(n: int) -> list[Any]:
        return [*tensors(case_of(n, student="logits", teacher="logits")), 50 + n, Objective(alpha=0.7)]

    check(function, given, graphs=2, dynamic=True)


def test_autocast_and_shifted_logits() -> None:
    def function(student: Tensor, teacher: Tensor) -> EntropyAwareKLOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return entropy_aware_kl(student[:, :-1], teacher[:, 1:])

    check(function, lambda n: tensors(case_of(n, student="logits", teacher="logits")))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize(("compiles", "reentrant"), [(False, True), (False, False), (True, False)])
def test_activation_checkpointing(compiles: bool, reentrant: bool, schedule: str) -> None:
    """torch.compile takes the kind that is not reentrant."""
    case = case_of(9)

    def loss(student: Tensor) -> Tensor:
        return entropy_aware_kl(student * 1.0, case.teacher, **case.arguments, schedule=schedule).loss

    def outer(student: Tensor) -> Tensor:
        return checkpoint(loss, student, use_reentrant=reentrant)

    expected = torch.autograd.grad(1.3 * loss(case.student), case.leaves)
    (1.3 * (torch.compile(outer, backend="aot_eager", fullgraph=True) if compiles else outer)(case.student)).backward()
    assert all(
        leaf.grad is not None and torch.equal(leaf.grad, e) for leaf, e in zip(case.leaves, expected, strict=True)
    )


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_inductor(schedule: str) -> None:
    def function(s: Tensor, t: Tensor, w: Tensor, v: Tensor) -> EntropyAwareKLOutput:
        return entropy_aware_kl(s, t, student_head=LMHead(w), teacher_head=LMHead(v), schedule=schedule)

    whole = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (5, 8):
        arguments = tensors(case_of(n))
        leaves = [t for t in arguments if t.requires_grad]
        agree(whole(*arguments), function(*arguments), leaves, lambda a, b: relative_error(a, b) < 1e-6)


def test_the_tracer_meets_no_table_of_all_modules() -> None:
    """It makes a variable of each entry of a dict that it meets, and there are thousands of modules."""
    case = make_case(leading=(2, 5), vocab_size=67)
    guarded: list[str] = []

    def every(guards: Any) -> list[bool]:
        guarded.extend(guard.name for guard in guards)
        return [True] * len(guards)

    whole = torch.compile(
        lambda s, t, w, v: entropy_aware_kl(s, t, student_head=LMHead(w), teacher_head=LMHead(v)).loss,
        backend="eager",
        fullgraph=True,
        options={"guard_filter_fn": every},
    )
    whole(*tensors(case))
    assert guarded and not [name for name in guarded if "sys.modules" in name]


def test_what_cannot_be_compiled_breaks_the_graph_and_says_why() -> None:
    case = case_of(5, student="logits", teacher="logits")

    def custom(student: Tensor) -> Tensor:
        objective = Objective(gate=lambda statistics: (statistics.teacher_entropy > 1).float())
        return entropy_aware_kl(student, case.teacher, objective=objective).loss

    def overwriting(student: Tensor) -> Tensor:
        return entropy_aware_kl(student * 1.0, case.teacher, inplace=True).loss

    for function, why in ((custom, "a callable gate cannot be part of a graph"), (overwriting, "inplace=True")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
            torch.compile(function, backend="aot_eager", fullgraph=True)(case.student)
        agree(torch.compile(function, backend="aot_eager")(case.student), function(case.student), case.leaves)


def test_errors_are_those_of_eager() -> None:
    student, teacher = tensors(case_of(5, student="logits", teacher="logits"))
    ids = torch.full((2, 5), 67)

    def outside(student: Tensor) -> EntropyAwareKLOutput:
        return entropy_aware_kl(student, teacher, token_ids=ids, old_log_probs=ids * -1.0, objective=PAPER)

    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 67\) where they count, got 67"):
        torch.compile(outside, backend="aot_eager", fullgraph=True)(student)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reduction must be one of"):
        torch.compile(EntropyAwareKL.apply, backend="aot_eager", fullgraph=True)(student, teacher, reduction="avg")


@pytest.mark.parametrize(
    "objective",
    [Objective(), PAPER, Objective.jsd(0.1), Objective(gate=QuantileGate(), temperature=(1.0, 3.0))],
    ids=str,
)
def test_options_survive_being_spelt(objective: Objective) -> None:
    assert compiled.read(repr(compiled.spelt(objective))) == objective


def test_an_option_that_cannot_be_spelt_is_refused() -> None:
    with pytest.raises(TypeError, match="options that can be written down"):
        compiled.spelt(Objective(gate=lambda statistics: statistics.teacher_entropy))


def test_functional_call_and_a_clear_no_to_transforms() -> None:
    case = case_of(5)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head, self.loss = torch.nn.Linear(24, 67), EntropyAwareKLLoss()

        def forward(self, hidden: Tensor) -> Tensor:
            head = LMHead(self.lm_head.weight, self.lm_head.bias)
            return self.loss(hidden, case.teacher, student_head=head, teacher_head=case.teacher_head).loss

    model = Model()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    replaced = torch.func.functional_call(model, parameters, (case.student,))
    expected = torch.autograd.grad(model(case.student), list(model.parameters()))
    assert all(map(torch.equal, torch.autograd.grad(replaced, list(parameters.values())), expected))
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (case.student,)))(parameters)
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
        torch.func.vmap(lambda s, t: EntropyAwareKL.apply(s, t))(torch.zeros(2, 3, 9), torch.zeros(2, 3, 9))
