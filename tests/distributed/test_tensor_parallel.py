"""A vocabulary that is spread over ranks gives what one process gives: values, gradients, bytes sent, memory."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from benchmarks import communication as model
from benchmarks import pretend
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
from tests.distributed.processes import _rank, free_port, run_ranks
from tests.distributed.traffic import Traffic
from tests.test_objectives import case_of, confident, entries_of

V = 611
FIGURES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate", "reverse_half", "forward_half")


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
SMALL = {"workspace_bytes": 1}  # chunks of 32 tokens
QUANTILE = Objective(gate=QuantileGate(0.6), alpha=0.7)
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
    Setup("temperatures", Objective(gate=EntropyGate(2.0), temperature=(2.0, 1.3)), layouts=ALL),
]


def part_of(case: Case, sizes: list[int]) -> tuple[Case, slice]:
    """This rank's share of a problem, as new leaves."""
    rank = dist.get_rank()
    here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def leaf(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def side(tensor: Any, head: LMHead | None) -> tuple[Any, LMHead | None]:
        if isinstance(tensor, TopKTeacher):
            return tensor, None
        if head is None:
            return leaf(tensor[..., here]), None
        bias = None if head.bias is None else head.bias[here]
        return leaf(tensor), LMHead(leaf(head.weight[here]), leaf(bias), scale=head.scale, softcap=head.softcap)

    student, student_head = side(case.student, case.student_head)
    teacher, teacher_head = side(case.teacher, case.teacher_head)
    part = replace(case, student=student, student_head=student_head, teacher=teacher, teacher_head=teacher_head)
    return part, here


def solved(case: Case, **options: Any) -> tuple[Any, list[Tensor]]:
    out = entropy_aware_kl(case.student, case.teacher, **case.arguments, **options)
    return out, list(torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss)))


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
    pairs += [(name, getattr(out, name), getattr(truth, name)) for name in FIGURES]
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
    shared = [getattr(out, name) for name in ("loss", *FIGURES)]
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


def halves_of(case: Case, sizes: list[int] | None = None) -> Case:
    return part_of(case, [305, 306] if sizes is None else sizes)[0]


def sent(case: Case, **options: Any) -> Traffic:
    """By one call of the loss and its backward, the exchange of the shards' sizes (once per call) apart."""
    with Traffic() as traffic:
        solved(case, tensor_parallel_group=dist.group.WORLD, **options)
    assert traffic.bytes["allgather_"] >= 32
    traffic.bytes["allgather_"] -= 32
    return traffic


def traffic_per_token() -> dict[str, float]:
    """Bytes per token that a rank puts in, all tokens valid, by what is asked for."""
    found = {}
    n, partial = 3 * 37, {"partial_hidden_gradient": True}
    for name, objective in {
        "default": Objective(),
        "sampled": Objective(reverse=Sampled()),
        "the paper's": replace(Objective.eopd_paper(), gate="always"),
        "jsd": Objective.jsd(),
        "no reverse half, open": Objective(gate=EntropyGate(-1.0), reverse="none"),
    }.items():
        case = case_of(objective)
        for schedule in ("chunked", "recompute"):
            found[f"{name}, {schedule}"] = (
                sum(sent(halves_of(case), schedule=schedule, **partial, **SMALL).bytes.values()) / n
            )
    found["dX"] = sum(sent(halves_of(case_of(Objective())), **SMALL).bytes.values()) / n - found["default, chunked"]
    wide = case_of(Objective(), vocab_size=2 * 611)
    found["twice the vocabulary"] = sum(sent(halves_of(wide, [611, 611]), **partial).bytes.values()) / n
    masked = case_of(Objective(), masked=True)
    found["masked"] = sum(sent(halves_of(masked), **partial).bytes.values()) / float(masked.mask.sum())  # type: ignore[union-attr]
    return found


def refused() -> dict[str, str]:
    """The errors of calls that no rank may answer or wait for."""
    rank, group = dist.get_rank(), dist.group.WORLD
    case, logits = case_of(Objective()), torch.zeros(4, 6)

    def error(*arguments: Any, **options: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as raised:
            entropy_aware_kl(*arguments, **{"tensor_parallel_group": group, **options})
        return f"{type(raised.value).__name__}: {raised.value}"

    part, other = halves_of(case), halves_of(case, [300, 311])
    heads = {"student_head": part.student_head, "teacher_head": other.teacher_head}
    return {
        "sizes": error(part.student, part.teacher, **heads),
        "sizes on one rank": error(logits, torch.zeros(4, 6 + rank)),
        "vocab_size": error(logits, logits, vocab_size=12 - rank),
        "too large": error(logits, logits, vocab_size=13),
        "nothing": error(logits[:, :0], logits[:, :0]),
        "tokens": error(logits[rank:], logits[rank:]),
        "options": error(logits, logits, schedule=("chunked", "recompute")[rank]),
        "group": error(logits, logits, tensor_parallel_group="tp"),
        "mesh": error(logits, logits, tensor_parallel_group=init_device_mesh("cpu", (1, 2))),
        "partial": error(logits, logits, partial_hidden_gradient=True),
        "partial alone": error(
            part.student,
            part.teacher,
            student_head=part.student_head,
            teacher_head=part.teacher_head,
            tensor_parallel_group=None,
            partial_hidden_gradient=True,
        ),
        "token_ids": error(
            logits,
            logits,
            objective=Objective(reverse=Sampled()),
            token_ids=torch.full((4,), 12),
            old_log_probs=torch.zeros(4),
        ),
    }


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


def waits_for_no_gpu() -> None:
    """After the first call, whose sizes the host has to read."""
    for objective in (Objective.eopd_paper(), Objective.jsd(), Objective(gate=QuantileGate(0.5), reverse="none")):
        part = halves_of(case_of(objective, masked=True, dtype=torch.bfloat16))
        options: dict[str, Any] = {"tensor_parallel_group": dist.group.WORLD, "num_items": torch.tensor(7.0)}
        upstream = torch.ones(())
        with pretend.gpu():
            for watch in (torch.no_grad(), pretend.Watch()):
                with watch:
                    out = entropy_aware_kl(part.student, part.teacher, **part.arguments, **options)
                    if out.loss.requires_grad:
                        torch.autograd.grad(out.loss, part.leaves, upstream)


def group_of_one() -> bool:
    """It is no group: bit for bit the default path."""
    alone, case = group_of_this_rank(), case_of(Objective())
    weights = case.student_head.weight, case.teacher_head.weight  # type: ignore[union-attr]
    with Traffic() as traffic:
        loss = EntropyAwareKL.apply(
            case.student, case.teacher, *weights, objective=case.objective, tensor_parallel_group=alone
        )
    return not traffic.calls and torch.equal(loss, entropy_aware_kl(case.student, case.teacher, **case.arguments).loss)


def memory(vocab_size: int = 8192, n: int = 256, dim: int = 32) -> dict[int, tuple[int, int]]:
    """The bytes that a step allocates at its peak with all of the vocabulary and with a half; and those of dW."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, dim, generator=generator), torch.randn(vocab_size, dim, generator=generator)
    peaks = {}
    for ranks in (1, 2):
        mine = weight[: vocab_size // ranks].clone().requires_grad_()
        options: dict[str, Any] = {} if ranks == 1 else {"tensor_parallel_group": dist.group.WORLD}
        head, x = LMHead(mine), hidden.clone().requires_grad_()
        with pretend.PeakMemory() as meter:
            out = entropy_aware_kl(x, hidden, student_head=head, teacher_head=LMHead(mine.detach()), **options)
            out.loss.backward()
        peaks[ranks] = (meter.peak, mine.nbytes)
    return peaks


def everything_else() -> dict[str, Any]:
    checks = (
        traffic_per_token,
        refused,
        sequence_parallel,
        partial_gradients,
        dtensor_heads,
        waits_for_no_gpu,
        group_of_one,
        memory,
    )
    return {check.__name__: check() for check in checks}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, everything_else)


def test_bytes_per_token(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        found = of_rank["traffic_per_token"]
        default, sampled = model.vocabulary_forward_bytes(), model.vocabulary_forward_bytes(sampled=True)
        assert (default, sampled) == (32, 40)
        for schedule in ("chunked", "recompute"):
            assert found[f"default, {schedule}"] == default
            assert found[f"sampled, {schedule}"] == sampled
            assert found[f"the paper's, {schedule}"] == sampled + model.vocabulary_top_k_bytes(16)
            assert found[f"jsd, {schedule}"] == model.vocabulary_forward_bytes(skewed=True)
            assert found[f"no reverse half, open, {schedule}"] == default + model.TEACHER_FIRST_BYTES
        assert found["dX"] == pytest.approx(model.vocabulary_hidden_gradient_bytes(24))
        assert found["twice the vocabulary"] == found["masked"] == default


def test_what_does_not_fit_together_is_refused_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    says = {
        "sizes": "ValueError: student and teacher must have shards of the same sizes on each rank of "
        "tensor_parallel_group, got student [305, 306] and teacher [300, 311]",
        "sizes on one rank": "got student [6, 6] and teacher [6, 7]",
        "vocab_size": "vocab_size must be the same on every rank of tensor_parallel_group, got [12, 11]",
        "too large": "vocab_size must be between 1 and the smaller vocabulary of all ranks together (student 12, "
        "teacher 12), got 13",
        "nothing": "at least one entry of the vocabulary on some rank",
        "tokens": "must be called with the same tokens and options",
        "options": "must be called with the same tokens and options",
        "group": "TypeError: tensor_parallel_group must be a ProcessGroup",
        "mesh": "TypeError: tensor_parallel_group must have one dimension",
        "partial": "ValueError: partial_hidden_gradient=True is for hidden states",
        "partial alone": "and no group",
        "token_ids": "token_ids must be in [0, 12) where they count, got 12",
    }
    for of_rank in two_ranks:
        for name, message in of_rank["refused"].items():
            assert says[name] in message


def test_sequence_parallel_hidden_states(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        assert of_rank["sequence_parallel"] < 5e-6
        chunked, chunked_sum, recomputed, recomputed_sum = of_rank["partial_gradients"]
        assert chunked > 0.1 and recomputed > 0.1, "a part alone is the whole"
        assert chunked_sum < 5e-6 and recomputed_sum < 5e-6


def test_dtensor_heads_have_dtensor_gradients(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        assert max(of_rank["dtensor_heads"]) < 5e-6


def test_a_group_of_one_is_no_group(two_ranks: list[dict[str, Any]]) -> None:
    assert all(of_rank["group_of_one"] for of_rank in two_ranks)


def test_memory_falls_with_the_ranks(two_ranks: list[dict[str, Any]]) -> None:
    """dW is halved; the blocks keep to their budget, which a half of the vocabulary here does not fill."""
    for of_rank in two_ranks:
        (whole, whole_weight), (half, half_weight) = of_rank["memory"][1], of_rank["memory"][2]
        blocks = 2 * 256 * 8192 * 4
        assert half_weight == whole_weight / 2
        assert whole == pytest.approx(blocks + whole_weight, rel=0.05)
        assert half == pytest.approx((blocks + whole_weight) / 2, rel=0.05)


def outlives_a_killed_rank(report: str) -> None:
    """Rank 1 is killed between two calls; the group's timeout is 20 s."""
    part, options = halves_of(case_of(Objective())), {"tensor_parallel_group": dist.group.WORLD}
    solved(part, **options)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for _ in range(3):
            solved(part, **options)
    except RuntimeError as error:
        Path(report).write_text(f"{time.monotonic() - started} {error}")
    os._exit(0)  # no goodbye to a group that is broken


def test_a_killed_rank_is_the_groups_own_error(tmp_path: Path) -> None:
    report = tmp_path / "report"
    arguments = (2, free_port(), str(tmp_path), 20.0, outlives_a_killed_rank, (str(report),))
    # Not run_ranks, which ends the survivor as soon as the other is gone.
    survivor, killed = spawn(_rank, arguments, nprocs=2, join=False).processes
    try:
        survivor.join(100)
        assert survivor.exitcode == 0 and report.exists(), "the survivor hangs, or met no error"
    finally:
        for process in (survivor, killed):
            process.kill()
            process.join()
    assert killed.exitcode == -signal.SIGKILL
    seconds, message = report.read_text().split(" ", 1)
    assert float(seconds) < 30 and "gloo" in message.lower()
