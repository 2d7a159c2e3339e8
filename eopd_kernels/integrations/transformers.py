"""transformers: distillation with its Trainer, by a mixin (full logits never exist) or by ``compute_loss_func``.

Both honour ``num_items_in_batch``, which the Trainer counts over all micro-batches of an optimizer step, and with
``average_tokens_across_devices`` over all processes. Both compare position t of student and teacher, whose logits are
about token t + 1, so that its label is ``labels[:, t + 1]``; the teacher reads the very inputs of the student.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import LMHead, Objective, entropy_aware_kl
from ..heads.backbone import backbone_of
from ..heads.from_model import unwrapped
from .batches import HOW, check_how, check_objective
from .figures import Figures
from .hooks import check_parameters, find, installed_version, moved

TESTED = "5.6 to 5.24"
# What the mixin replaces, and what transformers' Trainer calls it with.
METHODS = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
}

OLDER = ("4.", *(f"5.{minor}." for minor in range(10)))


class DistillationMixin:
    """Makes a ``transformers.Trainer`` distil: ``class Distiller(DistillationMixin, Trainer): ...``.

    Takes the Trainer's own arguments, and by keyword:

    Args:
        teacher_model: a causal language model of the student's vocabulary. It is moved to the Trainer's device, put
            into eval mode, and its parameters stop requiring gradients. It runs in the Trainer's mixed precision.
        objective: see :class:`Objective`; default ``Objective()``. A sampled reverse half is refused: the inputs have
            no old log-probabilities.
        vocab_size: as in :func:`entropy_aware_kl`, for vocabularies of two sizes.
        schedule, backend, workspace_bytes, gradient_filter, wait_free: likewise.

    Each line of the log that has a loss gets the means of what was seen on the tokens since the last one, of all
    micro-batches and processes: ``reverse_kl``, ``forward_kl``, ``teacher_entropy``, ``student_entropy``, ``gate``, in
    an evaluation with its prefix. ``figures.last_output`` is the last call's output, for callbacks.

    Batches need ``labels`` (−100: left out), or ``shift_labels`` that are shifted already, beside what the models read.
    Neither model's logits are computed, except those of one position, and in an evaluation with ``compute_metrics``,
    which is given the student's in full.

    Raises:
        HookMoved: the Trainer's ``compute_loss`` or its count of labels is not as in transformers 5.6 to 5.24.
        ValueError: a model is refused by :meth:`LMHead.from_model` or takes no ``logits_to_keep``; several GPUs in one
            process (``nn.DataParallel``).
    """

    def __init__(
        self,
        *arguments: Any,
        teacher_model: nn.Module,
        objective: Objective | None = None,
        vocab_size: int | None = None,
        **options: Any,
    ) -> None:
        self.how = {name: options.pop(name) for name in HOW if name in options}
        self.figures = Figures()
        super().__init__(*arguments, **options)
        trainer: Any = self
        for name, parameters in METHODS.items():
            # Not super()'s, which may take anything: these replace it, and transformers' Trainer is who calls.
            theirs = find("transformers", TESTED, "transformers", f"Trainer.{name}")
            check_parameters("transformers", TESTED, f"Trainer.{name}", theirs, parameters)
        if not hasattr(self, "model_accepts_loss_kwargs"):
            raise moved("transformers", TESTED, "Trainer does not say any more how it counts num_items_in_batch")
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"DistillationMixin does not work under nn.DataParallel, got {trainer.args.n_gpu} GPUs in one process: "
                "launch one process per GPU (torchrun, accelerate launch), or show one with CUDA_VISIBLE_DEVICES"
            )
        # Whatever the model's own loss is, ours needs a count, and of labels that _get_num_items_in_batch has shifted.
        trainer.model_accepts_loss_kwargs, trainer._loss_shifts_labels = True, False
        # Not `objective`: a Trainer keeps the figure of a hyperparameter search under that name.
        self.distillation_objective = Objective() if objective is None else objective
        check_objective(self.distillation_objective)
        self.vocab_size = vocab_size
        self.teacher_model = teacher_model.requires_grad_(False).eval().to(trainer.args.device)
        for name, model in (("model", trainer.model), ("teacher_model", teacher_model)):
            check_logits_to_keep(name, model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trainer: Any = self
        labels = shifted_labels(inputs)
        if labels is None:
            raise ValueError(
                "DistillationMixin needs labels in the batch, -100 where a token is left out: take a collator that "
                "makes them, e.g. DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        read = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        all_logits = return_outputs and trainer.compute_metrics is not None
        student, outputs = hidden_states(model, read, 0 if all_logits else 1)
        with torch.no_grad(), trainer.accelerator.autocast():  # as the student is run
            teacher, _ = hidden_states(self.teacher_model, read, 1)
        predicting = slice(labels.shape[1])
        out = entropy_aware_kl(
            student[:, predicting],
            teacher[:, predicting],
            student_head=LMHead.from_model(model),
            teacher_head=LMHead.from_model(self.teacher_model),
            labels=labels,
            num_items=num_items_in_batch,
            vocab_size=self.vocab_size,
            objective=self.distillation_objective,
            **self.how,
        )
        self.figures.add(out, model.training)
        loss = out.loss
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items counts the tokens of all processes, and data parallelism averages their gradients.
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The Trainer's count, of the labels of this loss: before transformers 5.10 it counts first tokens as well."""
        counted = [{"labels": shifted_labels(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        self.figures.log_with(super().log, self)(logs, *rest, **options)  # type: ignore[misc]


def compute_loss_func(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective | None = None,
    *,
    vocab_size: int | None = None,
    figures: Figures | None = None,
    **how: Any,
) -> Callable[..., Tensor]:
    """A ``Trainer(compute_loss_func=...)`` for those who cannot subclass: both models' logits then exist in full.

    The Trainer hands such a function the student's outputs and the labels, but no inputs. A hook on ``student``
    therefore keeps the inputs of its last call in training or evaluation, until the loss has run the teacher on them.
    :class:`DistillationMixin` is what saves memory; this saves what the loss itself would take beside the logits.

    Args:
        student: the model that the Trainer gets.
        teacher: a causal language model of the same vocabulary, on the student's device. It is put into eval mode, and
            its parameters stop requiring gradients.
        objective, vocab_size: as in :class:`DistillationMixin`.
        figures: takes up what the loss saw. After ``trainer.log = figures.log_with(trainer.log, trainer)`` the lines of
            the log have its means, as those of a :class:`DistillationMixin`. Default None.
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free.

    Returns:
        A function of ``(outputs, labels, num_items_in_batch=None)``.

    Raises:
        ValueError: transformers is older than 5.10.
    """
    objective = Objective() if objective is None else objective
    check_objective(objective)
    check_how("compute_loss_func", how)
    version = installed_version("transformers")
    if version.startswith(OLDER):
        raise ValueError(
            f"compute_loss_func needs transformers 5.10 or newer, got {version}, whose Trainer counts the labels of "
            "first tokens, which nothing predicts: take DistillationMixin, which counts for itself"
        )
    teacher.requires_grad_(False).eval()
    kept: list[dict[str, Any]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kept[:] = [{name: value for name, value in options.items() if name not in ("labels", "num_items_in_batch")}]

    student.register_forward_pre_hook(keep, with_kwargs=True)

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("compute_loss_func needs labels in the batch: -100 where a token is left out")
        if not kept:
            raise RuntimeError(
                "the student was not called before its loss: compute_loss_func(student, ...) must be given the very "
                "model that the Trainer has"
            )
        logits = outputs["logits"]
        with torch.no_grad():
            teacher_logits = teacher(**kept.pop()).logits
        out = entropy_aware_kl(
            logits[:, :-1],
            teacher_logits[:, :-1],
            labels=labels[:, 1:],
            num_items=num_items_in_batch,
            vocab_size=vocab_size,
            objective=objective,
            **how,
        )
        if figures is not None:
            figures.add(out, student.training)
        return out.loss

    return loss


def shifted_labels(inputs: dict[str, Any]) -> Tensor | None:
    """What each position predicts, [B, T], or [B, T - 1] without the last position; None without labels."""
    shifted: Tensor | None = inputs.get("shift_labels")
    if shifted is not None:
        return shifted
    labels: Tensor | None = inputs.get("labels")
    return None if labels is None else labels[:, 1:]


def check_logits_to_keep(name: str, model: nn.Module) -> None:
    LMHead.from_model(model)
    if "logits_to_keep" not in inspect.signature(unwrapped(model).forward).parameters:
        raise ValueError(
            f"{name} must take logits_to_keep, so that its logits can be left out, got a {type(model).__name__}; "
            "compute_loss_func works with its logits"
        )


def hidden_states(model: nn.Module, inputs: dict[str, Any], logits_to_keep: int) -> tuple[Tensor, Any]:
    """What the head would read, [B, T, D], and the model's outputs, with the logits of the last few positions (0: all).

    The model is called as a whole, so that data parallelism and the like see their forward; its hidden states are taken
    on the way from the backbone to the head.
    """
    taken: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        taken.append(outputs.last_hidden_state)

    handle = backbone_of(model).register_forward_hook(take)
    try:
        outputs = model(**inputs, logits_to_keep=logits_to_keep, use_cache=False, return_dict=True)
    finally:
        handle.remove()
    return taken[-1], outputs
