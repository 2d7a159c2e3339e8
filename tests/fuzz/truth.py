"""What a call must give: the reference on dense copies of the numbers, in fp64 or in the compute dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eopd_kernels import LMHead, TopKTeacher, reference
from eopd_kernels.loss import EntropyAwareKLOutput

if TYPE_CHECKING:
    from tests.fuzz.calls import Call, Side


@dataclass(frozen=True, eq=False)
class Distributions:
    """The logits of both sides in fp64, ``[N, V]``, over the compared entries, before and after a temperature."""

    z_s: Tensor
    z_t: Tensor | None
    temperatures: tuple[float, float] = (1.0, 1.0)

    def at(self, of_student: float, of_teacher: float) -> Distributions:
        return Distributions(self.z_s, self.z_t, (of_student, of_teacher))

    @property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.z_s / self.temperatures[0], 1)

    @property
    def log_q(self) -> Tensor | None:
        return None if self.z_t is None else torch.log_softmax(self.z_t / self.temperatures[1], 1)


def distributions(student: Side, teacher: Side | None, vocab_size: int) -> Distributions:
    """Of both sides at T = 1."""

    def logits(side: Side) -> Tensor:
        tensors = [d.tensor.double() for d in side.drawn]
        rows, head = side.of(tensors)
        return reference.transformed_logits(rows, head, vocab_size, 1.0)

    return Distributions(logits(student), None if teacher is None else logits(teacher))


def solve(call: Call, dtype: torch.dtype | None) -> tuple[EntropyAwareKLOutput, list[Tensor]]:
    """The reference's output in ``dtype``, and the gradients of the student's tensors that have one.

    None for the dtypes that the call is computed in, each side in its own. Everything arrives dense and in its plainest
    form, cut to the entries that are compared: the token's weight as one mask of numbers, the denominator divided by
    here, tokens of weight 0 with harmless numbers.
    """
    tokens, v = call.tokens, call.vocab_size
    valid = tokens.valid.view(call.leading)
    of_token = call.dtype if dtype is None else dtype

    def dense(side: Side, grads: tuple[bool, ...]) -> tuple[list[Tensor], tuple[Tensor, LMHead | None]]:
        leaves = [
            d.tensor.detach().to(side.dtype if dtype is None else dtype).contiguous().clone().requires_grad_(g)
            for d, g in zip(side.drawn, grads, strict=True)
        ]
        rows = torch.where(valid.unsqueeze(-1), leaves[0], 0.0)
        # Without mass as −inf is, but autograd can subtract it from itself.
        tensors = [torch.where(rows == -torch.inf, -1e4, rows), *leaves[1:]]
        tensors = [tensors[0][..., :v]] if side.weight is None else [tensors[0], *(t[:v] for t in tensors[1:])]
        return leaves, side.of(tensors)

    leaves, (student, student_head) = dense(call.student, call.grads)
    teacher: Tensor | TopKTeacher
    if call.teacher is None:
        teacher, teacher_head = tokens.clean_teacher(of_token), None
    else:
        _, (teacher, teacher_head) = dense(call.teacher, (False,) * len(call.teacher.drawn))
    per_token: dict[str, Any] = tokens.clean(of_token)
    none = call.options["reduction"] == "none"
    out = reference.entropy_aware_kl(
        student,
        teacher,
        student_head=student_head,
        teacher_head=teacher_head,
        mask=tokens.weights.to(of_token).view(call.leading),
        objective=call.objective,
        reduction="none" if none else "sum",
        **per_token,
    )
    loss = out.loss
    if call.options["reduction"] == "mean":
        loss = loss / tokens.denominator
    wanted = [leaf for leaf, g in zip(leaves, call.grads, strict=True) if g]
    gradients = torch.autograd.grad(loss, wanted, upstream(call).to(loss.dtype))
    object.__setattr__(out, "loss", loss.detach())
    return out, list(gradients)


def upstream(call: Call) -> Tensor:
    """The upstream gradient of the loss in fp64, never 1, as ``reduction="none"`` may meet it."""
    numbers = torch.Generator().manual_seed(call.seed + 1)
    if call.options["reduction"] != "none":
        return (0.4 + torch.rand((), generator=numbers)).mul(-1.5).double()
    if call.upstream == "expanded":
        return torch.tensor(-0.7, dtype=torch.float64).expand(call.leading)
    values = 1.7 * torch.randn(tuple(reversed(call.leading)), generator=numbers).double() - 0.6
    values = values.permute(tuple(reversed(range(len(call.leading)))))
    return values if call.upstream == "transposed" else values.contiguous()
