"""Runs a call and holds it against the truth.

Three parties: the truth in fp64, the same definitions in the compute dtype, and the kernels. What rounding does to a
figure depends on the call, and the second party shows it; the kernels sum in another order, which may cost a few times
as much. A gradient is rounded to its tensor's dtype beside that, twice where it is scaled after it was stored.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eopd_kernels import Sampled, TopK, entropy_aware_kl
from eopd_kernels.heads import products
from eopd_kernels.loss import EntropyAwareKLOutput
from tests.fuzz.calls import Call
from tests.fuzz.truth import Distributions, distributions, solve, upstream

FIGURES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate", "reverse_half", "forward_half")
INSIDE = {torch.float64: 2**-48, torch.float32: 2**-24}  # fp64 is measured against fp64
ROUNDING = {torch.float64: 2**-52, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def run(call: Call) -> tuple[EntropyAwareKLOutput, list[Tensor]]:
    """The kernels' output, and the gradients of the blocks of memory that the student's tensors are views of."""
    memories: list[Tensor] = []
    tensors: list[Tensor] = []
    for drawn, grad in zip(call.student.drawn, call.grads, strict=True):
        memory = drawn.memory.clone().requires_grad_(grad)
        memories.append(memory)
        tensors.append(drawn.layout.view(memory * 1 if grad else memory))
    student, student_head = call.student.of(tensors)
    teacher: Any = None
    teacher_head = None
    if call.teacher is None:
        teacher = call.tokens.teacher
    else:
        teacher, teacher_head = call.teacher.of([d.tensor for d in call.teacher.drawn])
    out = entropy_aware_kl(
        student,
        teacher,
        student_head=student_head,
        teacher_head=teacher_head,
        objective=call.objective,
        **call.tokens.arguments,
        **call.options,
    )
    leaves = [memory for memory, grad in zip(memories, call.grads, strict=True) if grad]
    return out, list(torch.autograd.grad(out.loss, leaves, upstream(call).to(out.loss.dtype)))


def check(call: Call) -> list[str]:
    """What is wrong with a call's results, in words; an exception is wrong as well.

    Where a processor multiplies bf16 the call is made without that as well, whose errors are bounded more closely.
    """
    with mock.patch.object(products, "widening", lambda *_: False):
        wrong = compared(call, INSIDE[call.narrowest])
    return wrong or (compared(call, 2**-9) if multiplied_in_bf16(call) else [])


def multiplied_in_bf16(call: Call) -> bool:
    """Whether the gradient of the logits is rounded to bf16 on its way into the products."""
    hidden, weight = call.student.rows, call.student.weight
    if weight is None:
        return False
    return products.operand_dtype(hidden.tensor, weight.tensor, call.student.dtype) == torch.bfloat16


def compared(call: Call, of_gradients: float) -> list[str]:
    """The same of one call; ``of_gradients``: the rounding of what the products behind gradients are of."""
    try:
        ours, gradients = run(call)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    truth, exact_gradients = solve(call, torch.float64)
    plain, plain_gradients = solve(call, None)
    inside = INSIDE[call.narrowest]
    size = largest(call, truth)
    wrong = []
    of_token = ("student_log_probs", "teacher_log_probs") if "token_ids" in call.tokens.given else ()
    for name in ("loss", *FIGURES, *of_token):
        value, of_plain, exact = (getattr(party, name).detach() for party in (ours, plain, truth))
        if name in of_token:  # what has no mass is -inf, which the truth writes as -1e4
            of_plain, exact = (torch.where(party < -5e3, -torch.inf, party) for party in (of_plain, exact))
        if value.shape != exact.shape or value.dtype != call.dtype:
            wrong.append(f"{name} is {value.dtype} {tuple(value.shape)}, not {call.dtype} {tuple(exact.shape)}")
            continue
        if may_be_unseen(call, name):
            unseen = value.isnan() & (truth.gate == 0)
            value, of_plain, exact = (torch.where(unseen, 0.0, party) for party in (value, of_plain, exact))
        cancelled = 4 * inside * size * (factor(call) if name == "loss" else 1.0)
        wrong += distance(name, value, of_plain, exact, cancelled, inside)
    indices = [index for index, grad in enumerate(call.grads) if grad]
    for index, value, of_plain, exact in zip(indices, gradients, plain_gradients, exact_gradients, strict=True):
        wrong += gradient_distance(call, index, value, of_plain, exact, 4 * of_gradients * size, inside)
    return wrong


def may_be_unseen(call: Call, figure: str) -> bool:
    """Whether a figure may be NaN on tokens whose gate is shut: they may be left out where there is no reverse half, by
    a gate that is given without a look at the teacher."""
    objective = call.objective
    if objective.reverse != "none" and objective.reverse_weight > 0:
        return False
    return figure in ("student_entropy", "forward_kl", "reverse_kl", "student_log_probs") or (
        figure in ("teacher_entropy", "teacher_log_probs") and "gate" in call.tokens.given
    )


def gradient_distance(
    call: Call, index: int, value: Tensor, of_plain: Tensor, exact: Tensor, cancelled: float, inside: float
) -> list[str]:
    drawn = call.student.drawn[index]
    name = f"gradient of {drawn}"
    dtype = drawn.memory.dtype
    if value.dtype != dtype:
        return [f"{name} is {value.dtype}"]
    adjoint = drawn.layout.adjoint
    # Numbers too small for fp16 are rounded to steps of 2^-24, once before they are scaled and once after.
    tiny = 2**-25 * (1 + scaling(call)) if dtype == torch.float16 else 0.0
    each = 2.1 * ROUNDING[dtype] * exact.abs() + tiny + cancelled * gradient_factor(call, index)
    # What an expanded tensor's gradient is summed of has been rounded before, and the sum is once more.
    rounded = adjoint(each) + 1.1 * ROUNDING[dtype] * adjoint(exact).abs()
    of_plain, exact = adjoint(of_plain), adjoint(exact)
    beyond = exact.abs() > 0.99 * torch.finfo(dtype).max  # what the dtype cannot hold
    value, of_plain, exact = (torch.where(beyond, 0.0, party) for party in (value, of_plain, exact))
    return distance(name, value, of_plain, exact, rounded, inside)


def largest(call: Call, truth: EntropyAwareKLOutput) -> float:
    """How large the terms may be that entropies and divergences are sums of: they are rounded even where they cancel,
    and before that the logits that are projected."""
    figures = [getattr(truth, name) for name in FIGURES[:4]]
    sizes = [figure[figure.isfinite()].max() for figure in figures if figure.isfinite().any()]
    both = distributions(call.student, call.teacher, call.vocab_size)
    for side, logits in ((call.student, both.z_s), (call.teacher, both.z_t)):
        if side is not None and side.weight is not None and logits is not None and len(logits):
            sizes.append(logits.nan_to_num(0.0).abs().max())
    if isinstance(call.objective.reverse, Sampled):  # a ratio of exp(log p − log p_old) is as exact as those two are
        old = call.tokens.clean(torch.float64)["old_log_probs"]
        if old.numel() > 0:
            sizes.append(truth.reverse_half.abs().max() * (1 + old.abs().max()))
    return (1.0 + float(sum(sizes)) / min(1.0, *call.objective.temperatures)) * (1.0 + of_tail(call, both))


def of_tail(call: Call, both: Distributions) -> float:
    """By how much the rounding of a sum near 1 is enlarged in the logarithm of what is left of it."""
    half = call.objective.forward
    if not (isinstance(half, TopK) and half.tail and call.tokens.valid.any()):
        return 0.0
    both = both.at(*call.objective.temperatures)
    if call.tokens.entries is None:
        assert both.log_q is not None
        top, ids = both.log_q[call.tokens.valid].topk(half.k, 1)
    else:
        ids, top = (entries[call.tokens.valid] for entries in call.tokens.entries)
    p = torch.where(top > -torch.inf, both.log_p[call.tokens.valid].gather(1, ids).exp(), 0.0)
    outside_q, outside_p = ((1 - mass.sum(1)).clamp_min(INSIDE[call.narrowest]) for mass in (top.exp(), p))
    return float((outside_q / outside_p).max())


def factor(call: Call) -> float:
    """By how much those terms weigh in the loss of the tokens together."""
    if call.tokens.weights.numel() == 0:
        return 0.0
    objective, weights = call.objective, call.tokens.weights
    whole = weights.max() if call.options["reduction"] == "none" else weights.sum()
    whole = whole / (call.tokens.denominator if call.options["reduction"] == "mean" else 1.0)
    return float(whole) * (objective.reverse_weight + objective.alpha + objective.cross_entropy) * objective.loss_factor


def scaling(call: Call) -> float:
    """By how much a gradient is multiplied at most after it was found."""
    factors = upstream(call).abs().reshape(-1).tolist()
    return max(factors, default=0.0) / (call.tokens.denominator if call.options["reduction"] == "mean" else 1.0)


def gradient_factor(call: Call, index: int) -> float:
    """And in the gradient of one of the student's tensors."""
    if call.tokens.weights.numel() == 0:
        return 0.0
    side, objective = call.student, call.objective
    of_token = float((call.tokens.weights * upstream(call).abs().reshape(-1)).max())
    size = of_token * (objective.reverse_weight + objective.alpha + objective.cross_entropy) * objective.loss_factor
    size *= abs(side.scale) / objective.temperatures[0]
    size /= call.tokens.denominator if call.options["reduction"] == "mean" else 1.0
    if side.weight is None:
        return size
    count = call.tokens.weights.numel()
    rows, weight = (float(d.tensor.double().nan_to_num(0.0).abs().max()) for d in (side.rows, side.weight))
    return size * (weight, rows * count, count)[index]


def distance(
    name: str, value: Tensor, of_plain: Tensor, exact: Tensor, rounded: Tensor | float, inside: float
) -> list[str]:
    """[] or what is wrong: each number may be as far from the truth as its rounding, a few times the plain party's
    error and a few roundings of the largest number."""
    if exact.numel() == 0:
        return []
    value, of_plain, exact = value.double(), of_plain.double(), exact.double()
    if not bool(of_plain.isfinite().all()):
        of_plain = torch.where(exact.isfinite(), of_plain, exact)
    same = torch.where(exact.isfinite(), value.isfinite(), (value == exact) | (value.isnan() & exact.isnan()))
    if not bool(same.all()):
        return [f"{name}: {int((~same).sum())} of {same.numel()} are not finite alike"]
    finite = exact.isfinite()
    value, of_plain, exact = (torch.where(finite, party, 0.0) for party in (value, of_plain, exact))
    allowed = rounded + 4 * (of_plain - exact).abs().max() + 16 * inside * exact.abs().max()
    excess = (value - exact).abs() - allowed
    if bool((excess <= 0).all()):
        return []
    at = int(excess.argmax())
    got, want, bound = (float(party.expand_as(exact).reshape(-1)[at]) for party in (value, exact, allowed))
    return [f"{name}: {got:.9g} instead of {want:.9g} ± {bound:.2g}"]
