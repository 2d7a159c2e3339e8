"""What an objective costs beyond the default: products, reads, memory, waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eopd_kernels import (
    EntropyGate,
    Objective,
    QuantileGate,
    Sampled,
    Skewed,
    TopK,
    TopKTeacher,
    entropy_aware_kl,
    reference,
)
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case, relative_error
from tests.test_objectives import GATES, HALVES, case_of
from tests.test_served_teacher import entries_of

SCHEDULES = ["chunked", "recompute"]
NUM_ITEMS = torch.tensor(7.0)


def step(case: Case, **options: Any) -> Any:
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, **options)
    out.loss.backward()
    return out


def flops(case: Case, **options: Any) -> tuple[int, Any]:
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, *rest, **named: 2 * a[0] * a[1] * b[1]}  # unknown to torch
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        out = step(case, **options)
    return counter.get_total_flops(), out


N, V, D_S, D_T = 111, 611, 24, 40
F = 2 * N * V


@pytest.mark.parametrize("gate", [EntropyGate(2.0), EntropyGate(0.3, normalized=True), QuantileGate(0.8)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_reverse_half_only_open_tokens_reach_the_student(schedule: str, gate: Any) -> None:
    case = case_of(Objective(gate=gate, reverse="none"))
    if isinstance(gate, QuantileGate) and schedule == "chunked":
        schedule = "auto"
    counted, out = flops(case, schedule=schedule)
    share = float(out.gate.mean())
    assert 0.1 < share < 0.6
    student, teacher = (3, 1) if schedule == "chunked" else (4, 2)  # few are open, so that they are put aside
    assert counted == pytest.approx(F * (student * D_S * share + D_T * (1 + teacher * share)))
    unknown = out.student_entropy.isnan()
    assert torch.equal(unknown, out.gate == 0) and not out.teacher_entropy.isnan().any()
    assert (case.student.grad[out.gate == 0] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("workspace_bytes", [None, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
def test_it_never_costs_more_than_every_token(threshold: float, workspace_bytes: int | None) -> None:
    case = case_of(Objective(gate=EntropyGate(threshold), reverse="none"), masked=True)
    counted, out = flops(case, workspace_bytes=workspace_bytes)
    assert case.mask is not None
    valid = float(case.mask.double().mean())
    share = float(out.gate.double().mean()) / valid
    whole = F * valid * (3 * D_S + D_T)
    least = F * valid * (3 * D_S * share + D_T)
    assert least * (1 - 1e-9) <= counted <= min(whole, least + F * valid * D_T * share) * (1 + 1e-9)
    if share > 0.8:
        assert counted == pytest.approx(least)  # the teacher's logits are there still
    plain = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "gate": out.gate})
    for a, b in zip(torch.autograd.grad(plain.loss, case.leaves), [leaf.grad for leaf in case.leaves], strict=True):
        assert b is not None and relative_error(b, a) < 1e-5
    assert relative_error(out.loss, plain.loss) < 1e-6 and relative_error(out.forward_half, plain.forward_half) < 1e-5
    assert torch.equal(out.student_entropy.isnan(), (out.gate == 0) & case.mask)


def test_the_teacher_that_goes_first_is_seen_in_the_compute_dtype() -> None:
    """fp64, because the student is, although its own logits are fp32; the gates are decided by what is seen."""
    case = case_of(Objective(gate=EntropyGate(2.0), reverse="none"), teacher="logits")
    teacher = 3 * case.teacher
    wide = case.to(torch.float64)
    out = entropy_aware_kl(wide.student, teacher, **wide.arguments)
    log_q = teacher.double().log_softmax(-1)
    torch.testing.assert_close(out.teacher_entropy, -(log_q.exp() * log_q).sum(-1), rtol=1e-12, atol=1e-12)


def test_a_given_gate_saves_the_teacher_too() -> None:
    case = case_of(Objective(reverse="none"))
    gate = (torch.arange(N).view(3, 37) % 5 == 0).float()
    counted, _ = flops(replace(case, per_token={"gate": gate}))
    assert counted == pytest.approx(F * (3 * D_S + D_T) * float(gate.mean()))


def test_soft_gates_that_are_zero_are_shut() -> None:
    case = case_of(Objective(reverse="none", gate=EntropyGate(3.0, sharpness=200.0)))
    counted, out = flops(case)
    share = float((out.gate > 0).double().mean())
    assert share < 0.9 and counted == pytest.approx(F * (3 * D_S * share + D_T * (1 + share)))


def test_clipped_tokens_are_left_out_of_the_gradients_products() -> None:
    case = case_of(Objective.on_policy_distillation())
    counted, _ = flops(case)
    clip = Sampled(0.05, 0.05)
    log_p = torch.log_softmax(reference.transformed_logits(case.student.detach(), case.student_head, V, 1.0), 1)
    y, old = case.per_token["token_ids"].view(-1, 1), case.per_token["old_log_probs"].view(-1, 1)
    narrow = replace(case, objective=replace(case.objective, reverse=clip))
    z_t = reference.transformed_logits(case.teacher, case.teacher_head, V, 1.0)
    advantage = torch.log_softmax(z_t, 1).gather(1, y) - old
    ratio = (log_p.gather(1, y) - old).exp()
    alive = ((ratio > 0.95) | (advantage > 0)) & ((ratio < 1.05) | (advantage < 0))
    share = float(alive.double().mean())
    assert 0.2 < share < 0.7
    fewer, _ = flops(narrow)
    assert fewer == pytest.approx(F * (D_S + D_T + 2 * D_S * share))
    assert counted > fewer


class Reads(TorchDispatchMode):
    """Elements that torch's own operations read of the teacher's logits, gathers apart."""

    def __init__(self, teacher: Tensor) -> None:
        super().__init__()
        self.storage, self.elements = teacher.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = "eopd_kernels" in str(func) or func.is_view or func is torch.ops.aten.gather.default
        for a in () if own else args:
            if isinstance(a, Tensor) and a.untyped_storage().data_ptr() == self.storage:
                self.elements += a.numel()
        return func(*args, **(kwargs or {}))


def test_a_top_k_half_reads_the_open_rows_once_more() -> None:
    case = case_of(
        Objective(gate=EntropyGate(4.0), forward=TopK(4)), student="logits", teacher="logits", vocab_size=20_000
    )
    with Reads(case.teacher) as reads:
        out = step(case)
    share = float(out.gate.mean())
    assert 0.1 < share < 0.9
    assert reads.elements <= share * N * 20_000


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_sampled_tokens_log_probs_are_a_gather(side: str, schedule: str) -> None:
    case = case_of(Objective(), given=("token_ids",), student="logits", teacher="logits")
    elements = []
    for token_ids in (None, case.per_token["token_ids"]):
        with Reads(getattr(case, side)) as reads:
            entropy_aware_kl(case.student, case.teacher, token_ids=token_ids, schedule=schedule)
        elements.append(reads.elements)
    assert elements[0] == elements[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("reverse", "forward"), HALVES, ids=str)
def test_nothing_waits_for_a_gpu(reverse: Any, forward: Any, schedule: str) -> None:
    objective = Objective(gate=EntropyGate(2.0), alpha=0.7, reverse=reverse, forward=forward)
    case = case_of(objective, masked=True, dtype=torch.bfloat16, given=("reverse_weights",))
    with pretend.gpu():
        truth = entropy_aware_kl(case.student, case.teacher, **case.arguments)
        with pretend.Watch():
            out = step(case, num_items=NUM_ITEMS, schedule=schedule, workspace_bytes=1, wait_free=True)
    torch.testing.assert_close(out.reverse_half, truth.reverse_half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "gate", [g for g in GATES if not callable(g) or isinstance(g, EntropyGate | QuantileGate)], ids=str
)
def test_no_gate_waits_for_a_gpu(gate: Any) -> None:
    case = case_of(Objective(gate=gate, reverse="none"), masked=True)
    with pretend.gpu(), pretend.Watch():
        step(case, num_items=NUM_ITEMS, wait_free=True)


def test_a_served_teacher_waits_for_no_gpu() -> None:
    objective = Objective.eopd_paper()
    case = case_of(objective, masked=True)
    teacher = TopKTeacher(*entries_of(case, 4), token_log_probs=torch.full((3, 37), -1.0))
    with pretend.gpu(), pretend.Watch():
        step(replace(case, teacher=teacher, teacher_head=None), num_items=NUM_ITEMS, wait_free=True)


@pytest.mark.parametrize("forward", ["full", TopK(16, teacher="raw", tail=True), Skewed(0.1)], ids=str)
@pytest.mark.parametrize("reverse", ["full", Sampled(), Skewed(0.1)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_grows_with_tokens_times_vocabulary(schedule: str, reverse: Any, forward: Any) -> None:
    peaks = []
    for n in (128, 320):  # two chunks and more: one alone lets go of its logits before the products
        objective = Objective(gate=EntropyGate(2.0), reverse=reverse, forward=forward)
        case = case_of(objective, leading=(n,), vocab_size=8192)
        with pretend.PeakMemory() as memory:
            step(case, schedule=schedule, workspace_bytes=2**22)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 0.1 * 192 * 8192 * 4


@pytest.mark.parametrize(
    "forward", [TopK(5), TopK(5, student="renormalized"), TopK(5, teacher="raw", tail=True)], ids=str
)
def test_columns_of_their_own_are_as_exact_as_others(forward: Any) -> None:
    """Near the teacher p − q̃ is small beside p and q̃: in 16 bits it is rounded once, not lost."""
    case = make_case(student="logits", teacher="logits", noise=0.01)
    objective = Objective(gate="always", reverse="none", forward=forward)
    case = replace(case, student=case.student.detach().bfloat16().requires_grad_(), objective=objective)
    (ours,) = torch.autograd.grad(entropy_aware_kl(case.student, case.teacher, **case.arguments).loss, case.student)
    wide = case.student.detach().double().requires_grad_()
    truth = reference.entropy_aware_kl(wide, case.teacher.double(), **case.arguments).loss
    (exact,) = torch.autograd.grad(truth, wide)
    of_their_own = torch.zeros_like(exact).scatter_(-1, case.teacher.topk(5, -1).indices, 1.0).bool()
    # Below that, p − q̃ of a likely column has lost more than these 2e-3 in fp32 already, 16 bits or not.
    relevant = of_their_own & (exact.abs() > 1e-3 * exact.abs().max())
    assert relevant.sum() > 100
    assert ((ours - exact) / exact)[relevant].abs().max() < 2**-8 + 2e-3
    assert relative_error(ours, exact) < 2**-8
