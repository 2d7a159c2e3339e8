"""A vocabulary that is spread over ranks gives what one process gives: values and gradients, whoever wants them how."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from eopd_kernels import (
    EntropyAwareKL,
    EntropyAwareKLLoss,
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
from tests.conftest import Case, relative_error, upstream_for
from tests.distributed.processes import run_ranks
from tests.distributed.shards import SMALL, halves_of, part_of, solved
from tests.distributed.traffic import Traffic
from tests.schedules.test_gradient_filter import EPSILON, TOKENS, VOCAB, expected, gradients, peaked
from tests.test_objectives import case_of, confident
from tests.test_served_teacher import entries_of

FIGURES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate", "reverse_half", "forward_half")
OF_TOKENS = ("student_log_probs", "teacher_log_probs")


@dataclass
class Setup:
    """One comparison with a single process."""

    name: str
    objective: Objective = field(default_factory=lambda: Objective(gate=EntropyGate(2.0), alpha=0.7))
    made: dict[str, Any] = field(default_factory=dict)  # of the problem
    options: dict[str, Any] = field(default_factory=dict)  # of the call
    given: tuple[str, ...] = ()
    top_k_teacher: bool = False
    tail: float | None = None  # scale and softcap of the heads
    layouts: tuple[str, ...] = ("uneven",)
    tolerance: float = 5e-6

    def case(self) -> Case:
        case = case_of(self.objective, given=self.given, **{"masked": True, **self.made})
        if "token_ids" in case.per_token:  # within every layout's vocabulary
            case.per_token["token_ids"].clamp_(max=380)
        if self.top_k_teacher:
            ids, log_probs = entries_of(case, 6)[:2]
            served = TopKTeacher(
                ids.clamp(max=380), log_probs, token_log_probs=torch.full(case.student.shape[:-1], -1.0)
            )
            case = replace(case, teacher=served, teacher_head=None)
        if self.tail is not None:
            case.student_head.scale, case.student_head.softcap = self.tail, 4.0  # type: ignore[union-attr]
            case.teacher_head.scale = -self.tail  # type: ignore[union-attr]
        return case


# Sizes of the shards, and the entries compared; a layout has 2 or 4 ranks.
LAYOUTS: dict[int, dict[str, tuple[list[int], int | None]]] = {
    2: {
        "uneven": ([200, 411], None),
        "padded": ([300, 311], 580),
        "padding alone": ([400, 211], 390),
        "nothing at all": ([0, 611], None),
    },
    4: {
        "uneven": ([150, 7, 300, 154], None),
        "padded": ([153, 153, 153, 152], 580),
        "padding alone": ([200, 200, 111, 100], 400),
        "nothing at all": ([200, 0, 411, 0], 601),
    },
}
FOUR = ("uneven", "padding alone")  # of the layouts, those that four ranks try: here they share two cores
ALL = ("uneven", "padded", "padding alone", "nothing at all")
QUANTILE = Objective(gate=QuantileGate(0.6), alpha=0.7)
OF_STUDENT = TopK(7, teacher="raw", tail=True, of="student")
NORMALIZED = Objective(gate=EntropyGate(0.4, normalized=True), alpha=0.7, combine="switch")

SETUPS = [
    Setup("default", layouts=ALL),
    Setup("default in small chunks", options=SMALL, layouts=ALL),
    Setup("default, recomputed", options={"schedule": "recompute", **SMALL}, layouts=ALL),
    Setup("logits", made={"student": "logits", "teacher": "logits"}, options=SMALL, layouts=ALL),
    Setup("logits, recomputed", made={"student": "logits", "teacher": "logits"}, options={"schedule": "recompute"}),
    Setup("hidden student, teacher's logits", made={"teacher": "logits"}, layouts=ALL),
    Setup("nobody is masked", made={"masked": False}),
    Setup("bias", made={"bias": True}, options=SMALL, layouts=ALL),
    Setup("scale and softcap", tail=1.3, made={"bias": True}, layouts=ALL),
    Setup("bf16", made={"dtype": torch.bfloat16}, options=SMALL, tolerance=2**-7),
    Setup("none", options={"reduction": "none", **SMALL}, layouts=ALL),
    Setup("sum", options={"reduction": "sum"}),
    Setup("the paper's", Objective.eopd_paper(), layouts=ALL),
    Setup("the paper's in small chunks", Objective.eopd_paper(), options=SMALL),
    Setup("the paper's, recomputed", Objective.eopd_paper(), options={"schedule": "recompute", **SMALL}, layouts=ALL),
    Setup("clipped rows leave the products", Objective(reverse=Sampled(0.01, 0.01), forward="none", gate="never")),
    Setup("top k with a tail", Objective(gate="always", forward=TopK(9, teacher="raw", tail=True)), layouts=ALL),
    Setup("reverse top k of the student", Objective(reverse=OF_STUDENT, forward=TopK(5)), options=SMALL, layouts=ALL),
    Setup("reverse top k, recomputed", Objective(reverse=OF_STUDENT), options={"schedule": "recompute", **SMALL}),
    Setup("cross-entropy", Objective(cross_entropy=0.5), options=SMALL, layouts=ALL),
    Setup("jsd", Objective.jsd(0.3), options=SMALL, layouts=ALL, tolerance=5e-5),
    Setup("jsd, recomputed", Objective.jsd(0.3), options={"schedule": "recompute", **SMALL}, tolerance=5e-5),
    Setup("skewed and top k", Objective(reverse=Skewed(0.3), forward=TopK(5)), layouts=ALL),
    Setup("soft gate of the student", Objective(gate=EntropyGate(2.0, of="student", sharpness=1.5), combine="blend")),
    Setup("normalized gate", NORMALIZED, layouts=ALL),
    Setup("quantile", QUANTILE, layouts=ALL),
    Setup("callable", Objective(gate=confident)),
    Setup("no reverse half", Objective(gate=EntropyGate(2.0), reverse="none"), options=SMALL, layouts=ALL),
    Setup("no reverse half, quantile", replace(QUANTILE, reverse="none")),
    Setup("served", Objective.eopd_paper(), top_k_teacher=True, layouts=ALL),
    Setup("served, recomputed", Objective.eopd_paper(), top_k_teacher=True, options={"schedule": "recompute"}),
    Setup("given per token", given=("gate", "reverse_weights", "forward_weights"), options=SMALL),
    Setup("token log-probabilities", given=("token_ids",), options=SMALL, layouts=ALL),
    Setup("token log-probabilities of logits", made={"student": "logits", "teacher": "logits"}, given=("token_ids",)),
    Setup("token log-probabilities, recomputed", given=("token_ids",), options={"schedule": "recompute", **SMALL}),
    Setup("token log-probabilities, teacher first", Objective(reverse="none"), given=("token_ids",), layouts=ALL),
    Setup("advantages", Objective(reverse=Sampled(clip_most=1.5)), given=("advantages",), options=SMALL),
    Setup("temperatures", Objective(gate=EntropyGate(2.0), temperature=(2.0, 1.3)), layouts=ALL),
]


def differences(setup: Setup, case: Case, sizes: list[int], vocab_size: int | None, tolerance: float) -> Any:
    """What is wrong with this rank's results, and their bits, which must be those of every rank."""
    options = setup.options | ({} if vocab_size is None else {"vocab_size": vocab_size})
    part, here = part_of(case, sizes)
    with Traffic() as traffic:
        out, gradients = solved(part, tensor_parallel_group=dist.group.WORLD, **options)
    assert traffic.calls["allreduce_"] > 1
    truth, expected = solved(case, **options)
    wrong = []
    pairs = [("loss", out.loss, truth.loss)]
    figures = FIGURES if "token_ids" not in case.per_token else (*FIGURES, *OF_TOKENS)
    pairs += [(name, getattr(out, name), getattr(truth, name)) for name in figures]
    whole = [] if case.student_head is None else [slice(None)]
    for i, (ours, theirs) in enumerate(zip(gradients, expected, strict=True)):
        rows = slice(None) if i < len(whole) else here
        cut = theirs[..., here] if case.student_head is None else theirs[rows]
        scale = theirs.abs().max().clamp_min(1e-30)
        error = float(((ours - cut).abs().max() if cut.numel() else torch.zeros(())) / scale)
        if not error < tolerance or ours.shape != cut.shape:
            wrong.append(f"gradient {i}: {error:.1e}")
    for name, ours, theirs in pairs:
        if not torch.equal(ours.isnan(), theirs.isnan()):
            wrong.append(f"{name}: NaN elsewhere")
        elif not (error := relative_error(ours.nan_to_num(), theirs.nan_to_num())) < max(tolerance, 1e-12):
            wrong.append(f"{name}: {error:.1e}")
    shared = [getattr(out, name) for name in ("loss", *figures)]
    if case.student_head is not None:
        shared.append(gradients[0])
    bits = [t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in shared]
    return wrong, bits


def compare_all() -> list[tuple[str, Any]]:
    """On two ranks every setup in fp32, and in fp64 at uneven shards; on four, fp64 of some."""
    results = []
    for setup in SETUPS:
        case = setup.case()
        for layout in setup.layouts:
            sizes, vocab_size = LAYOUTS[dist.get_world_size()][layout]
            name = f"{setup.name}, {layout}"
            two = dist.get_world_size() == 2
            if two:
                results.append((name, differences(setup, case, sizes, vocab_size, setup.tolerance)))
            if setup.tolerance < 1e-3 and (layout == "uneven" if two else setup.layouts == ALL and layout in FOUR):
                wide = case.to(torch.float64)
                results.append((f"{name}, fp64", differences(setup, wide, sizes, vocab_size, 1e-12)))
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_what_one_process_has(ranks: int) -> None:
    by_rank = run_ranks(ranks, compare_all)
    table = []
    for of_case in zip(*by_rank, strict=True):
        table += [f"{name}, rank {r}: {', '.join(wrong)}" for r, (name, (wrong, _)) in enumerate(of_case) if wrong]
        if any(bits != of_case[0][1][1] for _, (_, bits) in of_case):
            table.append(f"{of_case[0][0]}: the ranks do not agree to the bit")
    assert not table, "\n".join(table)
    assert len(by_rank[0]) > len(SETUPS)


class SequenceParallel(torch.autograd.Function):
    """Megatron's last stage: all-gather of the sequence's shards in forward, reduce-scatter of the gradient's parts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, hidden.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = list(gradient.contiguous().chunk(dist.get_world_size()))
        dist.reduce_scatter(own := torch.empty_like(parts[0]), parts)
        return own


def sequence_parallel() -> float:
    """How far the gradient of this rank's part of the sequence is from one process's: hidden states [T, B, D]."""
    case = case_of(Objective(gate=EntropyGate(2.0)), leading=(8, 3))
    _, (truth, _) = solved(case)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    hidden = case.student.detach()[mine].clone().requires_grad_()
    part = halves_of(case)

    loss = EntropyAwareKLLoss(case.objective, tensor_parallel_group=dist.group.WORLD, partial_hidden_gradient=True)
    out = loss(
        SequenceParallel.apply(hidden),
        part.teacher,
        student_head=part.student_head,
        teacher_head=part.teacher_head,
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden, upstream_for(out.loss))
    return float((gradient - truth[mine]).abs().max() / truth.abs().max())


def partial_gradients() -> list[float]:
    """The errors of the ranks' parts alone and of their sum, in both schedules."""
    case = case_of(Objective(gate=EntropyGate(2.0)), masked=True)
    truth, errors = solved(case)[1][0], []
    for schedule in ("chunked", "recompute"):
        options: dict[str, Any] = {"tensor_parallel_group": dist.group.WORLD, "schedule": schedule}
        part = solved(halves_of(case), partial_hidden_gradient=True, **options, **SMALL)[1][0]
        errors.append(relative_error(part, truth))
        dist.all_reduce(part)
        errors.append(relative_error(part, truth))
    return errors


def group_of_this_rank() -> Any:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def dtensor_heads() -> list[float]:
    """Heads that are DTensors, uneven by themselves: 611 entries on two ranks are 306 and 305."""
    mesh = init_device_mesh("cpu", (2,))
    case = case_of(Objective(gate=EntropyGate(2.0)), bias=True)
    _, (_, truth, truth_bias) = solved(case)

    def sharded(tensor: Tensor | None) -> Any:
        assert tensor is not None
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)]).requires_grad_(tensor.requires_grad)

    weight, bias = (sharded(t) for t in (case.student_head.weight, case.student_head.bias))  # type: ignore[union-attr]
    teacher = LMHead(*(sharded(t) for t in (case.teacher_head.weight, case.teacher_head.bias)))  # type: ignore[union-attr]
    out = entropy_aware_kl(
        case.student,
        case.teacher,
        **{**case.arguments, "student_head": LMHead(weight, bias), "teacher_head": teacher},
        tensor_parallel_group=mesh,
    )
    out.loss.backward(upstream_for(out.loss))
    for gradient in (weight.grad, bias.grad):
        assert isinstance(gradient, DTensor) and gradient.placements == (Shard(0),)
    alone = LMHead(sharded(case.student_head.weight))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"student_head.weight must be sharded on its vocabulary, Shard\(0\), over"):
        entropy_aware_kl(case.student, case.teacher, student_head=alone, tensor_parallel_group=group_of_this_rank())
    return [
        relative_error(weight.grad.full_tensor(), truth),
        relative_error(bias.grad.full_tensor(), truth_bias),
    ]


def group_of_one() -> bool:
    """It is no group: bit for bit the default path."""
    alone, case = group_of_this_rank(), case_of(Objective())
    weights = case.student_head.weight, case.teacher_head.weight  # type: ignore[union-attr]
    with Traffic() as traffic:
        loss = EntropyAwareKL.apply(
            case.student, case.teacher, *weights, objective=case.objective, tensor_parallel_group=alone
        )
    return not traffic.calls and torch.equal(loss, entropy_aware_kl(case.student, case.teacher, **case.arguments).loss)


def filtered() -> list[list[float]]:
    """How far the gradients under a filter are from its definition, in either schedule; and what the filter lost.

    Each rank finds and estimates columns of its own.
    """
    case, sizes = peaked(), [1100, VOCAB - 1100]
    part, here = part_of(case, sizes)
    errors = []
    for schedule in ("chunked", "recompute"):
        options: dict[str, Any] = {"schedule": schedule, "tensor_parallel_group": dist.group.WORLD, "reduction": "sum"}
        truth = expected(case, EPSILON, TOKENS, sizes)[0]
        ours, exact = gradients(part, gradient_filter=EPSILON, **options), gradients(part, **options)
        wanted = [truth[0], *(of_all[here] for of_all in truth[1:])]
        errors.append([relative_error(value, true) for value, true in zip(ours, wanted, strict=True)])
        errors.append([relative_error(value, true) for value, true in zip(ours[:2], exact[:2], strict=True)])
    return errors


def whoever_wants_them_how() -> dict[str, Any]:
    checks = (sequence_parallel, partial_gradients, dtensor_heads, group_of_one, filtered)
    return {check.__name__: check() for check in checks}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, whoever_wants_them_how)


def test_sequence_parallel_hidden_states(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        assert of_rank["sequence_parallel"] < 5e-6
        chunked, chunked_sum, recomputed, recomputed_sum = of_rank["partial_gradients"]
        assert chunked > 0.1 and recomputed > 0.1, "a part alone is the whole"
        assert chunked_sum < 5e-6 and recomputed_sum < 5e-6


def test_dtensor_heads_have_dtensor_gradients(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        assert max(of_rank["dtensor_heads"]) < 5e-6


def test_a_gradient_filter_is_what_its_definition_says(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        chunked, lost, recomputed, lost_too = of_rank["filtered"]
        assert max(chunked + recomputed) < 1e-11
        assert min(lost + lost_too) > 1e-6, "the case tells nothing"


def test_a_group_of_one_is_no_group(two_ranks: list[dict[str, Any]]) -> None:
    assert all(of_rank["group_of_one"] for of_rank in two_ranks)
