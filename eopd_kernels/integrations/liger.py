"""Liger: the signature of ``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``, for code that calls that already.

Nothing of Liger is imported. The arithmetic is this package's: fp32 logits and accumulators whatever the inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import LMHead, Objective, entropy_aware_kl
from ..arguments import finite
from .batches import check_how
from .figures import Figures


class LigerFusedLinearJSDLoss(nn.Module):
    """Generalised JSD of hidden states and heads, with Liger's arguments; or any other objective.

    Args:
        weight_hard_loss: multiplies the cross-entropy on the labels, at least 0; 0 at a temperature other than 1, where
            Liger's is still that at 1. Default 0.5, as Liger's.
        weight_soft_loss: multiplies the divergence; at least 0, beside a hard loss above 0. Default 0.5, as Liger's.
        beta: β in [0, 1] as in Liger (and GKD): 0 the forward KL, 1 the reverse KL, between them the JSD. Default 0.5.
        ignore_index: labels of tokens that are left out. Default −100.
        temperature: T > 0 of both sides, no factor T². Default 1.0.
        compiled, chunk_size: taken and without effect, as they are in Liger on the result.
        return_soft_hard_loss: return ``(loss, soft loss, hard loss)``, the latter two unweighted and without gradient.
            Default False.
        objective: an :class:`Objective` in place of β and the temperature, which must then keep their defaults.
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free: as in :func:`entropy_aware_kl`.

    Attributes:
        figures: what the loss saw, added up: ``figures.means(training)`` gives the means since it was last asked, and
            ``figures.last_output`` the last call's output.

    Raises:
        TypeError, ValueError: an argument is outside what is stated above.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        objective: Objective | None = None,
        **how: Any,
    ) -> None:
        super().__init__()
        if objective is not None and (beta, temperature) != (0.5, 1.0):
            raise ValueError(
                f"objective replaces beta and temperature, got both: {objective!r}, beta={beta!r}, "
                f"temperature={temperature!r}"
            )
        self.weight_soft_loss = finite("weight_soft_loss", weight_soft_loss, least=0.0)
        hard = finite("weight_hard_loss", weight_hard_loss, least=0.0)
        self.return_soft_hard_loss = return_soft_hard_loss
        self.ignore_index = ignore_index
        self.how = check_how("LigerFusedLinearJSDLoss", how)
        self.figures = Figures()
        self.objective = Objective.gkd(beta, temperature) if objective is None else objective
        if hard != 0:
            if self.weight_soft_loss == 0 or self.objective.temperatures[0] != 1 or self.objective.cross_entropy != 0:
                raise ValueError(
                    "weight_hard_loss must be 0 without a soft loss, at a temperature other than 1 (cross-entropy is "
                    "that at 1), or beside an objective with a cross_entropy of its own; Liger's default is 0.5. Got "
                    f"weight_hard_loss={weight_hard_loss!r}, weight_soft_loss={weight_soft_loss!r}, {self.objective!r}"
                )
            self.objective = replace(self.objective, cross_entropy=hard / self.weight_soft_loss)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Both losses by their weights, as means over the tokens whose label is not ``ignore_index``.

        Args:
            student_input: ``[N, D_s]`` hidden states.
            student_weight: ``[V, D_s]``.
            teacher_input: ``[N, D_t]``; no gradient flows into the teacher.
            teacher_weight: ``[V, D_t]``; V must be the student's: Liger pads the student with zeros where it is not.
            true_labels: ``[N]`` integer, aligned with the hidden states: nothing is shifted here.
            student_bias, teacher_bias: ``[V]`` or None.

        Raises:
            TypeError, ValueError: as :func:`eopd_kernels.entropy_aware_kl`.
        """
        if len(student_weight) != len(teacher_weight):
            raise ValueError(
                f"student_weight and teacher_weight must have one vocabulary, got {len(student_weight)} and "
                f"{len(teacher_weight)} entries: pass the common ones, e.g. teacher_weight[:{len(student_weight)}]"
            )
        out = entropy_aware_kl(
            student_input,
            teacher_input.detach(),
            student_head=LMHead(student_weight, student_bias),
            teacher_head=LMHead(teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()),
            labels=true_labels,
            token_ids=true_labels if self.return_soft_hard_loss else None,
            ignore_index=self.ignore_index,
            objective=self.objective,
            **self.how,
        )
        self.figures.add(out, self.training)
        loss = self.weight_soft_loss * out.loss
        if not self.return_soft_hard_loss:
            return loss
        assert out.student_log_probs is not None
        hard = -out.student_log_probs.sum() / out.valid.sum().clamp(min=1)
        return loss, out.loss.detach() - self.objective.cross_entropy * hard, hard
