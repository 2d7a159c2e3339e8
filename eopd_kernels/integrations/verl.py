"""verl: an entropy-gated top-k forward KL among its distillation losses, by its external-module hook.

A module of your own, named in VERL_USE_EXTERNAL_MODULES, registers it in every process of verl:

    from eopd_kernels.integrations.verl import register
    register()

and ``distillation.distillation_loss.loss_mode=entropy_aware_kl`` selects it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import Objective, TopK, TopKTeacher, entropy_aware_kl
from .hooks import check_caller, check_parameters, find

TESTED = "0.9.1"
LOSSES, FSDP = "verl.trainer.distillation.losses", "verl.trainer.distillation.fsdp.losses"
TOP_K_PARAMETERS = ("config", "distillation_config", "data", "student_logits", "data_format")
STRATEGIES = ("fsdp", "fsdp2", "veomni")


def register(objective: Objective | None = None, name: str = "entropy_aware_kl") -> None:
    """Registers a distillation loss with verl, for this process.

    verl's teacher is an inference server that hands out the top k log-probabilities, and its registered top-k losses
    are all computed by one function of the student's logits. That function is replaced by one that computes ours where
    ``loss_mode`` is ``name``, and calls verl's own otherwise.

    Args:
        objective: what each token's loss is: a top-k forward half alone, under any gate. Default: the served top k,
            renormalised, where its entropy is above 0.8 nats. The server gives no entropy, so that the gate uses the
            lower bound that the top k allow. The reverse half is verl's policy gradient
            (``use_policy_gradient``/``use_task_rewards``) or nothing.
        name: the ``loss_mode``. Default ``"entropy_aware_kl"``.

    Raises:
        HookMoved: verl is not as this was written for (0.9.1); the message says what has moved.
        ValueError: the objective has a reverse half or no top-k forward half; or verl has a loss of this name already.
    """
    objective = Objective(reverse="none", forward=TopK(16)) if objective is None else objective
    if not isinstance(objective, Objective) or objective.reverse != "none" or not isinstance(objective.forward, TopK):
        raise ValueError(
            "verl's distillation loss has the teacher's top k alone: objective must be "
            f"Objective(reverse='none', forward=TopK(...)), got {objective!r}"
        )
    settings = find("verl", TESTED, LOSSES, "DistillationLossSettings")
    decorator = find("verl", TESTED, LOSSES, "register_distillation_loss")
    check_parameters("verl", TESTED, f"{LOSSES}.register_distillation_loss", decorator, ["loss_settings"])
    original = find("verl", TESTED, LOSSES, "compute_topk_loss")
    check_parameters("verl", TESTED, f"{LOSSES}.compute_topk_loss", original, TOP_K_PARAMETERS)
    caller = find("verl", TESTED, LOSSES, "distillation_ppo_loss")
    check_caller("verl", TESTED, f"{LOSSES}.distillation_ppo_loss", caller, "compute_topk_loss")
    collect = find("verl", TESTED, LOSSES, "compute_forward_kl_topk")
    for helper in ("get_ulysses_sequence_parallel_world_size", "slice_input_tensor", "_chunked_topk_log_probs"):
        find("verl", TESTED, FSDP, helper)

    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> Any:
        if distillation_config.distillation_loss.loss_mode != name:
            return original(config, distillation_config, data, student_logits, data_format)
        if config.strategy not in STRATEGIES:
            raise NotImplementedError(
                f"loss_mode {name!r} supports the strategies {STRATEGIES}, got {config.strategy!r}"
            )
        return token_losses(student_logits, data["teacher_logprobs"], data["teacher_ids"], objective)

    # verl's own top-k loss collects what the function above has computed, whichever it was.
    decorator(settings(names=[name], use_topk=True))(collect)
    sys.modules[LOSSES].compute_topk_loss = compute_topk_loss  # type: ignore[attr-defined]


def token_losses(
    student_logits: Tensor, teacher_log_probs: Tensor, teacher_ids: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """What verl expects of each token, [1, n]: its loss, and the mass that both sides have on the teacher's top k.

    Args:
        student_logits: ``[1, n, V]``: all sequences of the micro-batch, packed; with sequence parallelism a slice.
        teacher_log_probs: ``[B, (T), k]``, nested.
        teacher_ids: likewise, entries of the vocabulary.
        objective: see :func:`register`.
    """
    verl: Any = sys.modules[FSDP]
    log_probs, ids = (tensor.values().unsqueeze(0) for tensor in (teacher_log_probs, teacher_ids))
    if verl.get_ulysses_sequence_parallel_world_size() > 1:
        log_probs, ids = (verl.slice_input_tensor(tensor, dim=1) for tensor in (log_probs, ids))
    losses = entropy_aware_kl(
        student_logits, TopKTeacher(ids, log_probs.float()), objective=objective, reduction="none"
    ).loss
    with torch.no_grad():
        student_mass = verl._chunked_topk_log_probs(student_logits, ids).exp().sum(-1)
    return {"distillation_losses": losses, "student_mass": student_mass, "teacher_mass": log_probs.exp().sum(-1)}
