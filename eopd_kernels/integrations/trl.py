"""trl: the divergence of its distillation trainers, replaced by ours inside ``with patch_trl(objective):``.

Two functions of trl are replaced, for the whole process: what ``DistillationTrainer`` calls on hidden states and heads,
and ``GKDTrainer.generalized_jsd_loss``, which is called on logits.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import LMHead, Objective, entropy_aware_kl
from .batches import check_how, check_objective
from .figures import Figures
from .hooks import check_caller, check_parameters, find, moved

TESTED = "1.15 and 1.16"
TRAINER, CHUNKED = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
GKD, JSD = "trl.experimental.gkd.gkd_trainer", "generalized_jsd_loss"
UNSLOTH = "_unsloth_gkd_jsd_supported_cache"
CHUNKED_PARAMETERS = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)
JSD_PARAMETERS = (
    "student_logits",
    "teacher_logits",
    "labels",
    "beta",
    "temperature",
    "reduction",
    "num_items_in_batch",
)


@contextmanager
def patch_trl(objective: Objective | None = None, **how: Any) -> Iterator[Figures]:
    """Inside of it trl's ``DistillationTrainer`` and ``GKDTrainer`` compute their loss with this package.

    Args:
        objective: what they minimise in place of their generalised JSD; then the ``beta`` of their configuration counts
            for nothing, and their ``temperature`` must be the objective's. Default None: the divergence that ``beta``
            and ``temperature`` say, with trl's own meaning (β = 0 forward KL, β = 1 reverse KL, between them a JSD).
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free: as in :func:`entropy_aware_kl`.

    Yields:
        The :class:`Figures` of what the loss sees. Each line of the trainers' log that has a loss gets their means,
        over the tokens of all micro-batches and processes since the last one; ``last_output`` is the last call's.

    Raises:
        HookMoved: trl is not as this was written for (1.15, 1.16); the message says what has moved, and nothing is
            replaced.
        ValueError: the objective needs what trl's trainers do not hand over: a sampled reverse half.
        RuntimeError: another thread is inside of a patch of its own. Patches nest within one thread.

    The trainers may be made inside or outside; what counts is when they train. Leaving restores trl, also when an
    exception passes.
    """
    if objective is not None:
        check_objective(objective)
    check_how("patch_trl", how)
    module, gkd = checked_hooks()
    figures = Figures()
    replaced = [
        (module, CHUNKED, chunked_loss(objective, figures, how)),
        (gkd, JSD, staticmethod(jsd_loss(objective, figures, how))),
        *((trainer, "log", logging(trainer.log, figures)) for trainer in (module.DistillationTrainer, gkd)),
    ]
    with only_thread, ExitStack() as stack:
        forget_unsloth(gkd)
        stack.callback(forget_unsloth, gkd)
        for owner, name, ours in replaced:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:  # inherited
                stack.callback(delattr, owner, name)
            setattr(owner, name, ours)
        yield figures


def checked_hooks() -> tuple[Any, Any]:
    """The module and the class in which something is replaced, after making sure that it is there and called."""
    chunked = find("trl", TESTED, TRAINER, CHUNKED)
    check_parameters("trl", TESTED, f"{TRAINER}.{CHUNKED}", chunked, CHUNKED_PARAMETERS)
    compute = find("trl", TESTED, TRAINER, "DistillationTrainer._compute_loss")
    check_caller("trl", TESTED, "DistillationTrainer._compute_loss", compute, CHUNKED)
    trainer = find("trl", TESTED, GKD, "GKDTrainer")
    check_parameters("trl", TESTED, f"GKDTrainer.{JSD}", find("trl", TESTED, GKD, f"GKDTrainer.{JSD}"), JSD_PARAMETERS)
    check_caller("trl", TESTED, "GKDTrainer.compute_loss", trainer.compute_loss, JSD)
    if not isinstance(trainer.__dict__.get(JSD), staticmethod):
        raise moved("trl", TESTED, f"GKDTrainer.{JSD} is not a static method of its own any more")
    return sys.modules[TRAINER], trainer


def forget_unsloth(trainer: Any) -> None:
    """Drops unsloth's note, on a trainer's class and those made of it, that the JSD is trl's: it asks again.

    Where unsloth 2026.10 has noted that, it computes the JSD itself, and a replacement would silently have no effect.
    """
    if UNSLOTH in vars(trainer):
        delattr(trainer, UNSLOTH)
    for subclass in trainer.__subclasses__():
        forget_unsloth(subclass)


class OnlyThread:
    """A lock that its thread may take again, and that refuses another one at once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is inside patch_trl, which replaces functions of trl for the whole process: train one "
                "after the other, or in processes of their own"
            )

    def __exit__(self, *exception: object) -> None:
        self.lock.release()


only_thread = OnlyThread()


def logging(log: Any, figures: Figures) -> Any:
    """A trainer's ``log`` that adds the figures' means."""

    @functools.wraps(log)
    def log_with_figures(self: Any, *arguments: Any, **options: Any) -> None:
        figures.log_with(functools.partial(log, self), self)(*arguments, **options)

    return log_with_figures


def effective(objective: Objective | None, beta: float, temperature: float) -> Objective:
    """What is minimised: trl's own divergence, or the user's, whose temperature must be that of trl's trainer."""
    if objective is None:
        return Objective.gkd(beta, temperature)
    if objective.temperatures != (temperature, temperature):
        raise ValueError(
            f"the objective's temperature is {objective.temperature} and that of trl's loss {temperature}: give both "
            "the same (DistillationConfig(temperature=...); GKDTrainer's loss is always taken at 1.0)"
        )
    return objective


def head(weight: Tensor, bias: Tensor | None, hidden: Tensor, scale: float, softcap: float | None) -> LMHead:
    """A head as trl hands it over; a weight that FSDP2 has sharded is gathered once, as trl does it."""
    if isinstance(weight, torch.distributed.tensor.DTensor):
        weight = weight.full_tensor().to(hidden.dtype)
        bias = bias.full_tensor() if isinstance(bias, torch.distributed.tensor.DTensor) else bias
    return LMHead(weight, bias, scale=scale, softcap=softcap)


def chunked_loss(objective: Objective | None, figures: Figures, how: dict[str, Any]) -> Any:
    """``_chunked_divergence_loss`` with another divergence: (loss, sum of the student's entropies, valid tokens)."""

    def _chunked_divergence_loss(
        student_hidden_states: Tensor,  # [B, C, D_s]
        teacher_hidden_states: Tensor,  # [B, C, D_t]
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,  # [B, C]
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student_head = head(
            student_lm_head_weight,
            student_lm_head_bias,
            student_hidden_states,
            student_logit_scale,
            student_final_logit_softcapping,
        )
        with torch.no_grad():  # trl leaves requires_grad of the teacher's parameters on
            teacher_head = head(
                teacher_lm_head_weight.detach(),
                None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
                teacher_hidden_states,
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            )
        valid = completion_mask != 0
        out = entropy_aware_kl(
            student_hidden_states,
            teacher_hidden_states.detach(),
            student_head=student_head,
            teacher_head=teacher_head,
            mask=valid,
            num_items=num_items_in_batch,
            objective=effective(objective, beta, temperature),
            **how,
        )
        figures.add(out, training=student_hidden_states.requires_grad)
        return out.loss, out.student_entropy.sum(), valid.sum()

    return _chunked_divergence_loss


def jsd_loss(objective: Objective | None, figures: Figures, how: dict[str, Any]) -> Any:
    """``generalized_jsd_loss`` with another divergence, of logits ``[B, T, V]``."""

    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if num_items_in_batch is None and reduction not in ("batchmean", "sum"):
            raise ValueError(
                f"the patched generalized_jsd_loss has reduction 'batchmean' and 'sum', got {reduction!r}, which "
                "is over the vocabulary's entries too"
            )
        num_items = num_items_in_batch
        if num_items is None and reduction == "batchmean" and labels is None:
            num_items = student_logits.size(0)  # trl's "batchmean" without labels: by the first dimension alone
        summed = num_items_in_batch is None and reduction == "sum"
        out = entropy_aware_kl(
            student_logits,
            teacher_logits.detach(),
            labels=labels,
            num_items=num_items,
            reduction="sum" if summed else "mean",
            objective=effective(objective, beta, temperature),
            **how,
        )
        figures.add(out, training=student_logits.requires_grad)
        return out.loss

    return generalized_jsd_loss
