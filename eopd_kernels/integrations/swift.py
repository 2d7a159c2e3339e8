"""ms-swift: the divergence of ``swift rlhf --rlhf_type gkd``, replaced by ours on hidden states and heads.

A file of your own, named in ``--external_plugins``:

    from eopd_kernels import Objective
    from eopd_kernels.integrations.swift import patch_swift
    patch_swift(Objective())
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from .. import Objective
from .batches import check_how, check_objective, check_plain_head
from .hooks import check_caller, check_parameters, find
from .liger import LigerFusedLinearJSDLoss

TESTED = "4.6.0"
TRAINER = "swift.rlhf_trainers.gkd_trainer"


def patch_swift(objective: Objective | None = None, **how: Any) -> None:
    """Makes ms-swift's ``GKDTrainer`` compute its loss with this package, for this process.

    Both models' hidden states go into the loss, whether or not ``--use_liger_kernel`` is given; nothing of Liger is
    needed. Each line of the trainer's log that has a loss gets the means of what the loss saw;
    ``trainer.liger_jsd_loss.figures.last_output`` is the last call's output.

    Args:
        objective: what is minimised in place of ms-swift's generalised JSD; then its ``--beta`` counts for nothing, and
            its ``--temperature`` (0.9 unless said otherwise, and that of the sampling too) must be the objective's.
            Default None: the divergence that ``--beta`` and ``--temperature`` say, with their meaning there.
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free: as in :func:`entropy_aware_kl`.

    Raises:
        HookMoved: ms-swift is not as this was written for (4.6.0); the message says what has moved. Nothing is
            replaced.
        NotImplementedError: this process trains with ms-swift's Megatron or Ray, whose losses this does not reach.
        ValueError: the objective has a sampled reverse half, for which ms-swift hands over no old log-probabilities.
            When the trainer is made: an option under which the loss would not be what it says.
    """
    if objective is not None:
        check_objective(objective)
    check_how("patch_swift", how)
    trainer = find("ms-swift", TESTED, TRAINER, "GKDTrainer")
    hook = find("ms-swift", TESTED, TRAINER, "GKDTrainer._prepare_liger_loss")
    check_parameters("ms-swift", TESTED, "GKDTrainer._prepare_liger_loss", hook, [])
    for caller, name in (
        ("__init__", "_prepare_liger_loss"),
        ("compute_loss", "use_liger_gkd_loss"),
        ("compute_loss", "_forward_redirection"),
        ("_compute_liger_loss", "liger_jsd_loss"),
    ):
        function = find("ms-swift", TESTED, TRAINER, f"GKDTrainer.{caller}")
        check_caller("ms-swift", TESTED, f"GKDTrainer.{caller}", function, name)
    redirection = find("ms-swift", TESTED, TRAINER, "_ForwardRedirection")
    if not {"swift.megatron", "swift.ray"}.isdisjoint(sys.modules):
        raise NotImplementedError(
            "patch_swift reaches ms-swift's GKDTrainer alone, and this process trains with its Megatron or Ray, whose "
            "loss would stay ms-swift's own: train with swift rlhf --rlhf_type gkd"
        )

    def _prepare_liger_loss(self: Any) -> None:
        check_trainer(self, objective)
        beta_and_temperature = {"beta": self.beta, "temperature": self.temperature} if objective is None else {}
        loss = GKDLoss(0.0, 1.0, objective=objective, **beta_and_temperature, **how)
        self.liger_jsd_loss, self.use_liger_gkd_loss, self._forward_redirection = loss, True, redirection()
        self.log = loss.figures.log_with(self.log, self)

    trainer._prepare_liger_loss = _prepare_liger_loss


class GKDLoss(LigerFusedLinearJSDLoss):
    """Liger's signature, in training where there are gradients: nobody tells ms-swift's loss of an evaluation."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        """As :meth:`LigerFusedLinearJSDLoss.forward`."""
        self.train(torch.is_grad_enabled())
        return super().forward(*arguments, **inputs)


def check_trainer(trainer: Any, objective: Objective | None) -> None:
    """Refuses what ms-swift's hidden states and heads do not say, or what its own loss would be needed for."""
    if trainer.teacher_model is None:
        raise ValueError("patch_swift needs --teacher_model: a teacher's API and self-distillation have no head here")
    if trainer.gkd_logits_topk is not None:
        raise ValueError(
            "patch_swift compares whole vocabularies, got --gkd_logits_topk "
            f"{trainer.gkd_logits_topk}: leave it out, or take Objective(forward=TopK({trainer.gkd_logits_topk}))"
        )
    if trainer.args.sft_alpha != 0:
        raise ValueError(
            f"patch_swift needs --sft_alpha 0, got {trainer.args.sft_alpha}: with hidden states ms-swift computes no "
            f"SFT loss; Objective(cross_entropy={trainer.args.sft_alpha}) is one, on the student's samples too"
        )
    if trainer.template.sequence_parallel_size != 1:
        raise ValueError(
            "patch_swift needs --sequence_parallel_size 1, whose hidden states are the whole sequence's, got "
            f"{trainer.template.sequence_parallel_size}"
        )
    if objective is not None and objective.temperatures != (trainer.temperature, trainer.temperature):
        raise ValueError(
            f"the objective's temperature is {objective.temperature} and ms-swift's {trainer.temperature}, which its "
            "loss and its sampling share: give both the same (--temperature; 0.9 where it is left out)"
        )
    for name, model in (("model", trainer.model), ("teacher_model", trainer.teacher_model)):
        check_plain_head(name, model, "ms-swift")
