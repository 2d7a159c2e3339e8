"""axolotl: its knowledge distillation from a served or stored top k, with this package's loss.

A module of your own, on Python's path, makes a plugin, which the configuration names in the place of axolotl's:

    from eopd_kernels import EntropyGate, Objective, TopK
    from eopd_kernels.integrations.axolotl import kd_plugin
    Plugin = kd_plugin(Objective(reverse="none", forward=TopK(), gate=EntropyGate(0.5)))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import LMHead, Objective, TopK, TopKTeacher, entropy_aware_kl
from .batches import check_how, check_objective, check_plain_head
from .figures import Figures
from .hooks import check_caller, check_parameters, find

TESTED = "0.21.0"
PLUGIN, TRAINER = "axolotl.integrations.kd", "axolotl.integrations.kd.trainer"
LOSS, LOSS_CLASS = "axolotl.integrations.kd.kernels.liger", "LigerFusedLinearKLTopKLogprobLoss"
LOSS_PARAMETERS = (
    "lm_head_weight",
    "student_hidden_states",
    "target_token_ids",
    "target_logprobs",
    "target_mask",
    "true_labels",
    "student_bias",
)


def kd_plugin(objective: Objective | None = None, **how: Any) -> Any:
    """Returns a subclass of axolotl's ``KDPlugin`` whose trainer computes its loss with this package.

    Each line of the trainer's log that has a loss gets the means of what the loss saw; ``trainer.figures.last_output``
    is the last call's output.

    Args:
        objective: what is minimised, times ``kd_alpha``: halves over a top k, with ``kd_temperature`` for the student's
            temperature, and 1 for that of the teacher, at whose temperature axolotl takes it already. Then ``kd_beta``
            counts for nothing. Default None: axolotl's own divergence by ``kd_beta`` (0 the forward KL, 1 the reverse
            KL) and ``kd_normalize_topk``, with axolotl's gradient; the loss that axolotl shows is T² times this one.
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free: as in :func:`entropy_aware_kl`.

    Raises:
        HookMoved: axolotl is not as this was written for (0.21.0); the message says what has moved.
        ValueError: the objective needs more than the teacher's top k. When the trainer is made: an option under which
            the loss would not be what it says.
    """
    if objective is not None:
        check_objective(objective)
        halves = objective.reverse, objective.forward
        if not all(half == "none" or (isinstance(half, TopK) and half.of == "teacher") for half in halves):
            raise ValueError(
                "axolotl hands over the teacher's top k alone: objective must have TopK(...) or 'none' for reverse and "
                f"forward, got {objective!r}"
            )
        if objective.cross_entropy != 0:
            raise ValueError(
                "objective.cross_entropy must be 0: axolotl counts the tokens of the teacher's mask, which are not "
                f"those of the labels, got {objective.cross_entropy}"
            )
    check_how("kd_plugin", how)
    base = find("axolotl", TESTED, PLUGIN, "KDPlugin")
    check_parameters("axolotl", TESTED, f"{PLUGIN}.KDPlugin.get_trainer_cls", base.get_trainer_cls, ["cfg"])

    class Plugin(base):  # type: ignore[misc, valid-type]
        """axolotl's KDPlugin with another loss."""

        def get_trainer_cls(self, cfg: Any) -> Any:
            """Returns the trainer's class, or None where ``kd_trainer`` is not set."""
            trainer = super().get_trainer_cls(cfg)
            return None if trainer is None else trainer_with(trainer, cfg, objective, how)

    return Plugin


def trainer_with(base: Any, cfg: Any, objective: Objective | None, how: dict[str, Any]) -> Any:
    """Returns a subclass of axolotl's trainer whose ``_kd_loss_fn`` is ours."""
    check_caller("axolotl", TESTED, f"{TRAINER}.AxolotlKDTrainer.compute_loss", base.compute_loss, "_kd_loss_fn")
    theirs = find("axolotl", TESTED, LOSS, f"{LOSS_CLASS}.forward")
    check_parameters("axolotl", TESTED, f"{LOSS}.{LOSS_CLASS}.forward", theirs, LOSS_PARAMETERS)
    # A stored top k is renormalised by axolotl's data sets, a served one where its collator is told to.
    renormalized = bool(cfg.kd_normalize_topk) or not cfg.kd_online_server_base_url

    class Trainer(base):
        """axolotl's KD trainer with another loss."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            check_plain_head("model", self.model, "axolotl", bias=False)
            self.figures = Figures()
            self._kd_loss_fn = loss_of(self.args, effective(objective, self.args, renormalized), self.figures, how)

        def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
            """As axolotl's, with the figures' means."""
            self.figures.log_with(super().log, self)(logs, *rest, **options)

    return Trainer


def effective(objective: Objective | None, args: Any, renormalized: bool) -> Objective:
    """What is minimised: the user's objective, or axolotl's divergence; refuses what would silently be another."""
    if args.kd_ce_alpha:
        raise ValueError(
            f"kd_ce_alpha must be 0, got {args.kd_ce_alpha}: axolotl's cross-entropy counts the tokens of the labels, "
            "this loss those of the teacher's mask"
        )
    temperature = 1.0 if args.kd_temperature is None else args.kd_temperature
    if objective is None:
        if args.kd_beta not in (None, 0, 1):
            raise ValueError(
                f"kd_beta must be 0 or 1 without an objective, got {args.kd_beta}: over a top k no JSD here"
            )
        if args.kd_normalize_topk:
            half = TopK(teacher="renormalized", student="renormalized")
        else:
            half = TopK(teacher="raw", student="full")
        halves: dict[str, Any] = {"reverse": half, "forward": "none", "gate": "never"}
        if not args.kd_beta:
            halves = {"reverse": "none", "forward": half, "gate": "always"}
        return Objective(temperature=(temperature, 1.0), **halves)
    if objective.temperatures != (temperature, 1.0):
        raise ValueError(
            f"the objective's temperature must be ({temperature}, 1.0), kd_temperature for the student and 1 for a "
            f"teacher that axolotl has taken at it already, got {objective.temperature}"
        )
    raw = [half for half in (objective.reverse, objective.forward) if isinstance(half, TopK) and half.teacher == "raw"]
    if renormalized and raw:
        raise ValueError(
            "objective must have TopK(teacher='renormalized'), because axolotl hands over a renormalised top k (with "
            f"kd_normalize_topk, and of a stored data set always), in which no mass is left outside, got {raw[0]!r}"
        )
    return objective


def loss_of(args: Any, objective: Objective, figures: Figures, how: dict[str, Any]) -> Any:
    """What axolotl calls as its ``_kd_loss_fn``: the sum over the tokens, which it divides by their number."""

    def loss(
        lm_head_weight: Tensor,  # [V, D]
        student_hidden_states: Tensor,  # [B, T, D]
        target_token_ids: Tensor,  # [B, T, k]
        target_logprobs: Tensor,  # [B, T, k]
        target_mask: Tensor,  # [B, T, k]
        true_labels: Tensor | None = None,  # [B, T]
    ) -> Tensor:
        valid = target_mask.bool()
        out = entropy_aware_kl(
            student_hidden_states,
            TopKTeacher(target_token_ids, target_logprobs, valid=valid),
            student_head=LMHead(lm_head_weight),
            mask=valid.any(-1),
            objective=objective,
            reduction="sum",
            **how,
        )
        figures.add(out, training=out.loss.requires_grad)
        return args.kd_alpha * out.loss

    return loss
