"""EntropyAwareKL as autograd sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyAwareKL, EntropyGate, LMHead, Objective, entropy_aware_kl, reference
from eopd_kernels.rows import FUNCTIONS
from tests.conftest import interpreted, make_case, relative_error, size, skip_unless, upstream_for

OBJECTIVE = Objective(gate=EntropyGate(1.0), alpha=0.7)


def double_case(kind: str, backend: str) -> tuple[Tensor, ...]:
    """student, teacher, student weight, teacher weight in fp64."""
    tokens = (1, 2) if interpreted(backend) else (2, 3)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if kind == "logits":
        return random(*tokens, 11).requires_grad_(), 2 * random(*tokens, 11)
    return random(*tokens, 5).requires_grad_(), random(*tokens, 4), random(11, 5).requires_grad_(), random(11, 4)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_gradcheck(kind: str, schedule: str, backend: str) -> None:
    skip_unless((kind, schedule) in (("logits", "recompute"), ("hidden", "chunked")), backend)
    student, teacher, *weights = double_case(kind, backend)
    options: dict[str, Any] = {"objective": OBJECTIVE, "schedule": schedule, "backend": backend}
    if kind == "logits":
        assert torch.autograd.gradcheck(lambda s: EntropyAwareKL.apply(s, teacher, **options), (student,))
    else:
        student_weight, teacher_weight = weights
        assert torch.autograd.gradcheck(
            lambda s, w: EntropyAwareKL.apply(s, teacher, w, teacher_weight, **options), (student, student_weight)
        )


def test_gradcheck_of_every_token(backend: str) -> None:
    student, teacher, student_weight, teacher_weight = double_case("hidden", backend)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()

    def losses(s: Tensor, w: Tensor, b: Tensor) -> Tensor:
        head = LMHead(w, b, scale=0.8, softcap=3.0)
        return entropy_aware_kl(
            s, teacher, student_head=head, teacher_head=LMHead(teacher_weight), reduction="none", backend=backend
        ).loss

    assert torch.autograd.gradcheck(losses, (student, student_weight, bias))


def test_apply_is_the_loss_of_the_keyword_front() -> None:
    case = make_case()
    assert case.student_head is not None and case.teacher_head is not None
    loss = EntropyAwareKL.apply(
        case.student, case.teacher, case.student_head.weight, case.teacher_head.weight, objective=case.objective
    )
    assert isinstance(loss, Tensor) and loss.shape == () and issubclass(EntropyAwareKL, torch.autograd.Function)
    assert torch.equal(loss, entropy_aware_kl(case.student, case.teacher, **case.arguments).loss)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_a_second_backward_through_a_retained_graph(student: str, schedule: str) -> None:
    case = make_case(student=student)
    loss = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule).loss
    gradients = [
        torch.autograd.grad(loss, case.leaves, torch.tensor(upstream), retain_graph=upstream < 3)
        for upstream in (-0.5, 2.0, 3.0)
    ]
    for first, second, third in zip(*gradients, strict=True):
        assert relative_error(second / 2.0, first / -0.5) < 1e-6
        assert relative_error(third / 3.0, first / -0.5) < 1e-6
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, case.leaves, torch.tensor(1.0))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_accumulation_into_grad(student: str, schedule: str) -> None:
    """.grad adds up over calls, and no call's buffers are reused for another's gradient."""
    case = make_case(student=student)
    for upstream in (0.5, -2.0):
        (upstream * entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule).loss).backward()
    accumulated = [leaf.grad.clone() for leaf in case.leaves if leaf.grad is not None]
    loss = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    for grad, expected in zip(accumulated, torch.autograd.grad(-1.5 * loss, case.leaves), strict=True):
        assert relative_error(grad, expected) < 1e-5


@pytest.mark.parametrize("upstream", [1.0, -0.5])
@pytest.mark.parametrize(("schedule", "workspace_bytes"), [("chunked", None), ("chunked", 40_000), ("recompute", None)])
def test_leaves_get_their_gradient_in_the_dtype_that_they_ask_for(
    schedule: str, workspace_bytes: int | None, upstream: float
) -> None:
    """As FSDP2's cast parameters do from torch 2.15 on: what was added up in fp32 is not rounded in between."""

    def gradients(grad_dtype: torch.dtype) -> list[Tensor]:
        case = make_case(dtype=torch.bfloat16, bias=True)
        for leaf in case.leaves:
            leaf.grad_dtype = grad_dtype
        options: dict[str, Any] = {"schedule": schedule, "workspace_bytes": workspace_bytes}
        (upstream * entropy_aware_kl(case.student, case.teacher, **case.arguments, **options).loss).backward()
        return [leaf.grad for leaf in case.leaves if leaf.grad is not None]

    pairs = list(zip(gradients(torch.float32), gradients(torch.bfloat16), strict=True))
    assert len(pairs) == 3
    for wide, rounded in pairs:
        assert (wide.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        assert not torch.equal(wide, wide.bfloat16().float())
        assert relative_error(wide.bfloat16(), rounded) < 2**-8


@pytest.mark.parametrize("frozen", ["head", "trunk"])
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_only_what_is_needed_is_computed(frozen: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(bias=True)
    assert case.student_head is not None and case.student_head.bias is not None
    if frozen == "head":
        case.student_head.weight.requires_grad_(False)
        case.student_head.bias.requires_grad_(False)
    else:
        case.student.requires_grad_(False)
    exact = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    expected = torch.autograd.grad(exact, case.leaves, torch.tensor(0.7))

    skipped = (
        "eopd_kernels.schedules.student_gradient.grad_weight"
        if frozen == "head"
        else "eopd_kernels.heads.lm_head.LMHead.grad_hidden"
    )
    monkeypatch.setattr(skipped, lambda *a, **k: pytest.fail(f"{skipped} was called"))
    loss = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule).loss
    for value, truth in zip(torch.autograd.grad(loss, case.leaves, torch.tensor(0.7)), expected, strict=True):
        assert relative_error(value, truth) < 1e-5


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_without_gradients_only_statistics_are_taken(student: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(student=student)
    expected = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).loss.detach()
    for name, functions in FUNCTIONS.items():
        refusing = functions._replace(row_gradient=_refuse, row_loss_and_gradient=_refuse)
        monkeypatch.setitem(FUNCTIONS, name, refusing)
    if how == "frozen":
        for leaf in case.leaves:
            leaf.requires_grad_(False)
        loss = entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    else:
        with getattr(torch, how)():
            loss = entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    assert not loss.requires_grad
    assert relative_error(loss, expected) < 1e-6


def _refuse(*arguments: object) -> Any:
    pytest.fail("a gradient was computed that nobody asked for")


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_a_double_backward_is_refused(schedule: str) -> None:
    case = make_case()
    loss = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule).loss
    first = torch.autograd.grad(loss, case.leaves, create_graph=True)
    expected = torch.autograd.grad(
        reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).loss, case.leaves
    )
    for value, truth in zip(first, expected, strict=True):
        assert relative_error(value, truth) < 1e-5
    with pytest.raises(RuntimeError, match="EntropyAwareKL has no second derivative"):
        torch.stack([g.square().sum() for g in first]).sum().backward()


def test_small_fp16_gradients_survive_until_a_scaler_multiplies_them() -> None:
    """Each is below the smallest fp16 number once divided by the count, and far above it after the scaler's factor."""
    case = make_case(student="logits", teacher="logits", vocab_size=2000).to(torch.float16)
    loss = entropy_aware_kl(case.student, case.teacher, **case.arguments, num_items=10**6).loss
    (gradient,) = torch.autograd.grad(loss, case.student, torch.tensor(2.0**16))
    exact = case.to(torch.float64)
    truth = reference.entropy_aware_kl(exact.student, exact.teacher, **exact.arguments, num_items=10**6).loss
    (expected,) = torch.autograd.grad(truth, exact.student, torch.tensor(2.0**16))
    assert relative_error(gradient, expected) < 2e-3
    kept = expected.abs() > 1e-4
    assert 0.02 < kept.float().mean() and (gradient[kept] != 0).all()


def test_a_plain_backward_gives_the_gradient_of_the_mean() -> None:
    for student in ("logits", "hidden"):
        case = make_case(student=student, masked=True)
        entropy_aware_kl(case.student, case.teacher, **case.arguments).loss.backward()
        loss = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
        for leaf, expected in zip(case.leaves, torch.autograd.grad(loss, case.leaves), strict=True):
            assert leaf.grad is not None and relative_error(leaf.grad, expected) < 1e-5


def test_tied_heads() -> None:
    """One weight as embedding and student head, and its detached twin as the teacher's head."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    ids = torch.randint(0, 50, (4, 6), generator=generator)
    noise = torch.randn(4, 6, 8, generator=generator)

    def gradient(function: object) -> Tensor:
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        teacher = (hidden + noise).detach()
        head = LMHead(weight), LMHead(weight.detach())
        loss = function(hidden, teacher, student_head=head[0], teacher_head=head[1], objective=OBJECTIVE).loss  # type: ignore[operator]
        return torch.autograd.grad(loss, weight, torch.tensor(-1.3))[0]

    assert relative_error(gradient(entropy_aware_kl), gradient(reference.entropy_aware_kl)) < 1e-5


def test_autocast_does_not_round_the_logits() -> None:
    case = make_case()
    loss = entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    with torch.autocast("cpu", torch.bfloat16):
        under = entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
        under.backward()
    assert torch.equal(loss, under)
    expected = torch.autograd.grad(loss, case.leaves)
    for leaf, truth in zip(case.leaves, expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, truth)


def test_activation_checkpointing() -> None:
    case = make_case()

    def loss(student: Tensor) -> Tensor:
        return entropy_aware_kl(student * 1.0, case.teacher, **case.arguments).loss

    checkpointed = torch.utils.checkpoint.checkpoint(loss, case.student, use_reentrant=False)
    plain = torch.autograd.grad(loss(case.student), case.leaves, torch.tensor(0.3))
    for value, truth in zip(torch.autograd.grad(checkpointed, case.leaves, torch.tensor(0.3)), plain, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("layout", ["dense", "shifted", "padded vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_place_the_gradient_takes_the_logits_memory(dtype: torch.dtype, layout: str, backend: str) -> None:
    few: dict[str, Any] = (
        {"leading": (3, 4)} if interpreted(backend) else {}
    )  # one tile: with more of them a shift may round otherwise
    case = make_case(student="logits", teacher="logits", dtype=dtype, masked=True, **few)
    assert case.mask is not None
    options: dict[str, Any] = {"objective": case.objective, "backend": backend, "mask": case.mask}
    teacher = case.teacher
    if layout == "shifted":
        options["mask"], teacher = case.mask[:, :-1], teacher[:, :-1]
    if layout == "padded vocabulary":
        options["vocab_size"] = 600
    results = []
    for inplace in (False, True):
        logits = case.student * 1.0  # the output of something whose backward does not need it
        student = logits[:, :-1] if layout == "shifted" else logits
        before = student.detach().clone()
        loss = entropy_aware_kl(student, teacher, **options, inplace=inplace).loss
        assert torch.equal(student, before) != inplace
        gradients = [
            torch.autograd.grad(loss, case.student, torch.tensor(u), retain_graph=u < 1)[0] for u in (-0.4, 3.0)
        ]
        results.append((loss, *gradients))
    for apart, in_place in zip(*results, strict=True):
        assert torch.equal(apart, in_place)


def test_in_place_is_noticed_by_others_who_need_the_logits() -> None:
    case = make_case(student="logits", teacher="logits")
    logits = case.student * 1.0
    other = logits.square().sum()
    loss = entropy_aware_kl(logits, case.teacher, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_in_place_leaves_the_logits_alone_where_no_gradient_is_taken() -> None:
    case = make_case(student="logits", teacher="logits")
    with torch.no_grad():
        logits = case.student * 1.0
        entropy_aware_kl(logits, case.teacher, inplace=True)
        assert torch.equal(logits, case.student)


def test_inputs_are_left_as_they_were() -> None:
    case = make_case(masked=True, bias=True)
    before = [t.detach().clone() for t in (*case.leaves, case.teacher)]
    entropy_aware_kl(case.student, case.teacher, **case.arguments).loss.backward()
    for tensor, copy in zip((*case.leaves, case.teacher), before, strict=True):
        assert torch.equal(tensor.detach(), copy)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_the_number_of_threads_changes_nothing(threads: int, schedule: str, backend: str) -> None:
    case = make_case(student="logits", teacher="logits", masked=True, **size(backend))
    results = []
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            out = entropy_aware_kl(
                case.student, case.teacher, **case.arguments, schedule=schedule, backend=backend, reduction="sum"
            )
            results.append((out.reverse_kl, *torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss))))
        finally:
            torch.set_num_threads(1)
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-9)
