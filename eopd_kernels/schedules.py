"""The order in which blocks of logits come and go: "chunked" by tokens, "recompute" by slices of the vocabulary.

chunked                                     recompute
             V                                           V
    ┌───────────────────┐                       ┌────┬────┬────┬────┐
    │ ───────────────►  │ chunk 1               │ │  │ │  │ │  │ │  │   statistics of every slice, merged;
  N ├───────────────────┤                     N │ ▼  │ ▼  │ ▼  │ ▼  │   then every slice once more,
    │ ───────────────►  │ chunk 2               │    │    │    │    │   for the gradient
    └───────────────────┘                       └────┴────┴────┴────┘
F(3·D_s + D_t) flops, gradient while the    F(4·D_s + 2·D_t) flops, the logits are projected
chunk's logits are alive                    again in backward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import devices
from .columns import Patch
from .figures import Figures, gate_of
from .gradient_filter import FilteredGradient
from .objective import Coefficients
from .parallel import Shard
from .problem import Buffer, Chunk, Problem, Tiling
from .sides import (
    HiddenGradient,
    HiddenSide,
    LogitsGradient,
    LogitsSide,
    NothingHeld,
    Rows,
    Side,
    StudentGradient,
)
from .statistics import RowStatistics
from .terms import Own, Terms, alive_rows, scaled, terms_of

SCHEDULES = ("chunked", "recompute")
CPU = torch.device("cpu")

# Where no budget is asked for: the blocks of logits that live at one time (both sides, and the gradient where it has
# memory of its own), and the fewest tokens of a chunk. Each chunk reads both heads and dW again: at V = 151,936 and
# D = 1024 chunks of 103 tokens (128 MiB) cost 27 % over the unchunked products, chunks of 128 cost 15 %. Measured in
# docs/benchmarks.md, "Workspace".
WORKSPACE_BYTES = 128 * 2**20
USUAL_MIN_TOKENS = 128
# The same on a GPU. A chunk of M tokens reads and writes the fp32 dW, 8·V·D bytes, beside a product of 2·M·V·D flops:
# at the data sheets' bf16 rates and bandwidths the product takes as long from M = 4·rate/bandwidth on: 610 (A100),
# 1,180 (H100), 820 (H200), 1,130 (B200). So a chunk may have 1,024 tokens even where that exceeds the budget
# (V = 151,936 in bf16: 1.6 GB), and a batch of 1,024 tokens or fewer is never split into launches too small to fill the
# device. Arithmetic, not measured.
GPU_WORKSPACE_BYTES = 2**30
GPU_USUAL_MIN_TOKENS = 1024
# No budget, however small, makes blocks smaller than these: the products would cost a multiple.
MIN_TOKENS = 32
MIN_COLUMNS = 512
# A chunk of hidden states leaves rows without a gradient out of its products where at most this share is left: copying
# the others' logits together costs 16 bytes each, the products 4·D flops.
COMPACT_BELOW = 0.75


def usual_workspace(device: torch.device) -> tuple[int, int]:
    """The budget in bytes and the fewest tokens of a chunk where none is asked for."""
    if devices.on_host(device):
        return WORKSPACE_BYTES, USUAL_MIN_TOKENS
    return GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS


def tiling(
    schedule: str,
    n: int,
    student: Side,
    teacher: Side | None,
    gathered: bool,
    workspace_bytes: int | None,
    device: torch.device = CPU,
    shard: Shard | None = None,
) -> Tiling:
    """The shape of a block under a budget of ``workspace_bytes`` for the blocks of both sides.

    Chunks of tokens are made equal in size; a side whose blocks are views of its logits needs no workspace. All ranks
    that share a vocabulary find the same chunks: from the widest shard, and with logits counted whatever their strides.
    Where they do not fit into one chunk, two chunks live at a time (across.py).
    """
    budget, min_tokens = usual_workspace(device) if workspace_bytes is None else (workspace_bytes, MIN_TOKENS)
    vocab_size = student.vocab_size if shard is None else shard.widest
    gathered = gathered or shard is not None
    logit_bytes = student.block_bytes(gathered) + student.gradient_bytes()
    if teacher is not None:
        logit_bytes += teacher.block_bytes(gathered)
    if n == 0 or logit_bytes == 0:
        return Tiling(max(n, 1), student.vocab_size)
    logits = budget // logit_bytes
    if schedule == "chunked":
        if shard is not None and n * vocab_size > logits:
            logits //= 2
        tokens = max(logits // vocab_size, min_tokens)
        return Tiling(-(-n // -(-n // tokens)), student.vocab_size)
    columns = min(max(logits // n, MIN_COLUMNS), vocab_size)
    tokens = max(logits // columns, MIN_TOKENS)
    return Tiling(-(-n // -(-n // tokens)), min(columns, student.vocab_size))


@dataclass(frozen=True, eq=False)
class Seen:
    """What a forward pass leaves of all N tokens; 0 (statistics: empty) for those that were not visited.

    Args:
        packed: ``[N, 8]`` the statistics.
        gate: ``[N]`` how far it is open.
        reverse, forward: ``[N]`` the halves, 0 where they have no weight.
        loss: ``[N]`` c_r·R + c_f·F.
    """

    packed: Tensor
    gate: Tensor
    reverse: Tensor
    forward: Tensor
    loss: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Seen:
        weights = problem.weights
        packed = RowStatistics.empty(len(weights), weights.dtype, weights.device).packed
        return cls(packed, *(torch.zeros_like(weights) for _ in range(4)))

    def put(self, rows: Rows, packed: Tensor, gate: Tensor, terms: Terms | None) -> None:
        """Of one chunk; without terms, its halves are not known yet."""
        self.packed[rows], self.gate[rows] = packed, gate
        if terms is not None:
            self.reverse[rows], self.forward[rows], self.loss[rows] = terms.reverse, terms.forward, terms.loss


def visit(problem: Problem) -> tuple[Seen, Terms]:
    """The first visit of the recompute schedule: every slice of every chunk; what is seen, and the gradient's terms."""
    figures = Figures.empty(problem, len(problem.weights))
    blocks = problem.blocks()
    for rows in problem.chunks():
        chunk, tokens = blocks.take(rows), problem.tokens.take(rows)
        of_chunk = Figures.empty(problem, len(chunk.student))
        for columns in problem.slices():
            of_chunk.see(problem, tokens, columns, *chunk.logits(columns), with_top_k=True)
        figures.put(rows, of_chunk)
    visited: Rows = slice(None) if problem.index is None else problem.index
    whole = figures.take(visited)
    for _ in whole.across_ranks(problem, problem.tokens.take(visited)):
        pass
    whole.top_k_across_ranks(problem)
    figures.put(visited, whole)
    if problem.objective.skews is not None:
        for rows in problem.chunks():
            chunk, of_chunk = blocks.take(rows), figures.take(rows)
            for columns in problem.slices():
                of_chunk.see_mixture(problem, *chunk.logits(columns))
            figures.put(rows, of_chunk)
        whole = figures.take(visited)
        whole.mixture_across_ranks(problem)
        figures.put(visited, whole)
    statistics = figures.known_statistics(problem.tokens)
    gate = gate_of(problem, statistics, problem.tokens, problem.weights)
    terms = figures.terms(problem, statistics, gate, problem.tokens, problem.weights)
    return Seen(statistics.packed, gate, terms.reverse, terms.forward, terms.loss), terms


def teacher_statistics(problem: Problem, look: bool) -> RowStatistics:
    """The teacher's half of every token's statistics, ``[N, 8]``; NaN for the student's, and for tokens not visited.
    Without a look at it there is what is known beforehand."""
    packed = problem.weights.new_full((len(problem.weights), 8), torch.nan)
    teacher = problem.teacher
    if teacher is None or not look:
        return Figures(packed).known_statistics(problem.tokens)
    buffer = Buffer(teacher, problem.block)
    for rows in problem.chunks():
        taken = teacher.take(rows)
        of_chunk = RowStatistics.empty(len(taken), packed.dtype, packed.device)
        for columns in problem.slices():
            of_chunk = of_chunk.merge(RowStatistics(of_teacher(problem, buffer.logits(taken, columns))))
        packed[rows] = of_chunk.packed
    if problem.shard is not None:
        visited: Rows = slice(None) if problem.index is None else problem.index
        packed[visited] = teacher_across_ranks(packed[visited], problem.shard)
    return without_student(packed)


def of_teacher(problem: Problem, logits: Tensor) -> Tensor:
    """The statistics ``[n, 8]`` of the teacher's logits ``[n, k]`` beside themselves, in the call's compute dtype."""
    logits = logits.double() if problem.weights.dtype == torch.float64 else logits
    return problem.functions.row_statistics(logits, logits, problem.transforms[3:] * 2)


def without_student(packed: Tensor) -> RowStatistics:
    """Statistics ``[n, 8]`` of which only the teacher's are known; the student's become NaN."""
    packed[:, [0, 1, 5, 6, 7]] = torch.nan
    return RowStatistics(packed)


def teacher_across_ranks(packed: Tensor, shard: Shard) -> Tensor:
    """Statistics of which the teacher's maximum, sum and self are those of all ranks' columns, 12 bytes of each row."""
    packed, maximum = packed.clone(), packed[:, 2].clone()
    shard.maximum(maximum).wait()
    sums = RowStatistics(packed).recentred_sums(maximum, maximum)[:, 1:3].contiguous()  # Z_t and A
    shard.sum(sums).wait()
    packed[:, 2], packed[:, 3], packed[:, 4] = maximum, sums[:, 0], sums[:, 1]
    return packed


def visit_with_gradient(problem: Problem, gradient: StudentGradient) -> Seen:
    """The chunked schedule: what is seen of every token, and the gradient of Σ w·L."""
    seen = Seen.empty(problem)
    blocks = problem.blocks()
    columns = slice(0, problem.student.vocab_size)
    for rows in problem.chunks():
        chunk = blocks.take(rows)
        chunk_gradient(problem, chunk, *chunk.logits(columns), gradient, seen)
    return with_losses(problem, seen)


def chunk_gradient(
    problem: Problem,
    chunk: Chunk,
    student: Tensor,  # [n, V]
    teacher: Tensor,  # [n, V]
    gradient: StudentGradient,
    seen: Seen,
) -> None:
    """A chunk from its logits to its part of the gradient."""
    if not problem.fused:
        figures = first_figures(problem, chunk, student, teacher)
        general_gradient(problem, chunk, student, teacher, figures, gradient, seen)
        return
    columns = slice(0, problem.student.vocab_size)
    out = gradient.target(chunk.rows, columns, student)
    packed, gate = problem.functions.row_loss_and_gradient(
        student,
        teacher,
        problem.weights[chunk.rows],
        problem.objective.gate_threshold(problem.vocab_size),
        list(problem.objective.combination),
        problem.transforms,
        out,
    )
    seen.put(chunk.rows, packed, gate, None)
    gradient.begin(chunk.rows, chunk.student)
    gradient.add(columns, out)
    gradient.end()


def with_losses(problem: Problem, seen: Seen) -> Seen:
    """What was seen, with the halves and losses that the fused kernel leaves to be computed of all tokens at once."""
    if not problem.fused:
        return seen
    terms = terms_of(problem.objective, RowStatistics(seen.packed), None, None, None, seen.gate, problem.tokens)
    return Seen(seen.packed, seen.gate, terms.reverse, terms.forward, terms.loss)


def first_figures(problem: Problem, chunk: Chunk, student: Tensor, teacher: Tensor) -> Figures:
    """What one visit of a chunk's logits ``[n, V]`` leaves behind, before anything is known of its gates."""
    tokens, columns = problem.tokens.take(chunk.rows), slice(0, problem.student.vocab_size)
    figures = Figures.empty(problem, len(student))
    figures.see(problem, tokens, columns, student, teacher, with_top_k=False)
    return figures


def general_gradient(
    problem: Problem,
    chunk: Chunk,
    student: Tensor,  # [n, V]
    teacher: Tensor,  # [n, V]
    figures: Figures,
    gradient: StudentGradient,
    seen: Seen,
) -> None:
    """A chunk under any objective, from its first figures to its part of the gradient.

    The logits are alive between the statistics and the gradient, so that whatever has to look at the numbers can.
    """
    rows, columns = chunk.rows, slice(0, problem.student.vocab_size)
    tokens, weights = problem.tokens.take(rows), problem.weights[rows]
    if problem.objective.skews is not None:
        figures.see_mixture(problem, student, teacher)
        figures.mixture_across_ranks(problem)
    statistics = figures.known_statistics(tokens)
    gate = gate_of(problem, statistics, tokens, weights)
    figures.see_top_k(problem, student, teacher, gate)
    terms = figures.terms(problem, statistics, gate, tokens, weights)
    seen.put(rows, statistics.packed, gate, terms)

    coefficients, own = scaled(terms.coefficients, terms.own, weights)
    packed, taken = statistics.packed, chunk.student
    if isinstance(problem.student, HiddenSide) and devices.readable(weights):
        # Rows without a gradient, such as clipped ones, are left out of the products.
        alive = alive_rows(coefficients, own).nonzero().squeeze(1)
        if len(alive) <= COMPACT_BELOW * len(weights):
            rows = alive + rows.start if isinstance(rows, slice) else rows[alive]
            student, teacher, packed, taken = student[alive], teacher[alive], packed[alive], taken[alive]
            coefficients, own = coefficients.take(alive), None if own is None else own.take(alive)
    out = gradient.target(rows, columns, student)
    block_gradient(problem, student, teacher, 0, packed, coefficients, own, out)
    gradient.begin(rows, taken)
    gradient.add(columns, out)
    gradient.end()


def gradient_of(
    problem: Problem, packed: Tensor, coefficients: Coefficients, own: Own | None, gradient: StudentGradient
) -> None:
    """The second visit of the recompute schedule: the gradient of rows with these statistics and coefficients."""
    blocks = problem.blocks()
    for rows in problem.chunks():
        chunk = blocks.take(rows)
        gradient.begin(rows, chunk.student)
        of_rows = packed[rows], coefficients.take(rows), None if own is None else own.take(rows)
        for columns in problem.slices():
            student, teacher = chunk.logits(columns)
            out = gradient.target(rows, columns, student)
            block_gradient(problem, student, teacher, columns.start, *of_rows, out)
            gradient.add(columns, out)
        gradient.end()


def block_gradient(
    problem: Problem,
    student: Tensor,  # [n, k]
    teacher: Tensor,  # [n, k]
    start: int,
    packed: Tensor,  # [n, 8]
    coefficients: Coefficients,
    own: Own | None,
    out: Tensor,  # [n, k], may be the student's
) -> None:
    """The gradient of the block that begins ``start`` columns into this rank's part: the row's form by the kernel,
    single columns here."""
    skews, transforms = problem.objective.skews, problem.transforms
    patch = None
    if own is not None:
        statistics = RowStatistics(packed)
        first = problem.offset + start
        patch = Patch.of(student, teacher, first, statistics, coefficients, own, skews, transforms)
    if skews is None:
        problem.functions.row_gradient(student, teacher, packed, *coefficients, transforms, out)
    else:
        problem.functions.row_mixture_gradient(student, teacher, packed, *coefficients, list(skews), transforms, out)
    if patch is not None:
        patch.write(out)


def student_gradient(
    tensors: Sequence[Tensor | None],
    problem: Problem,
    weights: Tensor,
    needs: tuple[bool, bool, bool],
    gradient_filter: float | None,
    inplace: bool = False,
) -> StudentGradient:
    """Where the gradient of this kind of student goes.

    Args:
        tensors: the student, its weight, its bias.
        weights: ``[N]`` what the gradient of each token's loss is multiplied by.
        needs: whether the gradients of the student, its weight and its bias are asked for.
        gradient_filter, inplace: as in :func:`eopd_kernels.entropy_aware_kl`.
    """
    side, shard = problem.student, problem.shard
    if shard is not None and shard.size == 0:
        only_hidden = (needs[0], False, False)
        of_entry = HiddenGradient(side, only_hidden, problem.block, shard) if isinstance(side, HiddenSide) else None
        return NothingHeld(tensors, needs, of_entry)
    if isinstance(side, LogitsSide):
        assert tensors[0] is not None
        return LogitsGradient(tensors[0], side, inplace)
    assert isinstance(side, HiddenSide)
    if gradient_filter is None or len(weights) == 0:
        return HiddenGradient(side, needs, problem.block, shard)
    return FilteredGradient(side, needs, problem.block, gradient_filter * weights.abs().max(), shard)
