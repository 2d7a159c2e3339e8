"""On-policy distillation as a transformers Trainer: the part to copy.

    get_batch_samples   one optimizer step: its completions, drawn with those of its rollout, in micro-batches
    compute_loss        one micro-batch: hidden states of both models into the loss; no logits
    after the step      the sums of all micro-batches and processes become one line of metrics

Checkpoints, schedules, mixed precision, DDP, FSDP, DeepSpeed and the loggers are the library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from eopd_kernels import Objective, Sampled

from .answering import Answering
from .checkpoints import AtomicCheckpoints
from .clock import Clock
from .errors import RunError
from .forward import inside_forward
from .metrics import StepTotals
from .models import moved, without_dropout
from .options import TrainingOptions
from .report import peak_memory_mib
from .rollouts import Completion, Rollouts, collate
from .served_teacher import ServedTeacher
from .stream import Draw, PromptStream
from .teachers import Teacher, Teachers
from .training import clipped_by_ratio, score

PER_TOKEN = ("teacher_entropy", "reverse_kl", "forward_kl", "gate")  # nats, and how far it is open


class OnPolicyTrainer(AtomicCheckpoints):
    """Trains ``student`` towards ``teacher`` on completions that ``answer`` draws for the prompts of ``stream``.

    Args:
        student: a causal language model; the weights are trained in the dtype they have.
        teacher: another one of the same vocabulary, whole on every process; or one behind a server; or several.
        stream: the draws of the whole run: exactly ``max_steps`` times the prompts of a step.
        answer: from draws to completions, called once per rollout and process with its share of it.
        objective: what is minimised.
        tau: where the metrics split tokens, nats of teacher entropy.
        vocab_size: the ids that both models have.
        rollout_prompts: answered at once, by the student as it is then, for that many optimizer steps; default: of one.
        on_step: called on the main process after each optimizer step with its metrics, its histograms and this
            process's completions.
    """

    # compute_loss divides by the tokens of the whole optimizer step, of all processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        tokenizer: Tokenizer,
        args: TrainingOptions,
        stream: PromptStream,
        *,
        objective: Objective,
        tau: float,
        vocab_size: int,
        rollout_prompts: int | None = None,
        on_step: Callable[[dict[str, Any], dict[str, Any], list[Completion]], None],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        # The distribution that is trained is the one that was sampled from.
        without_dropout(student)
        # Without something to evaluate on the library never does.
        data: dict[str, Any] = {"data_collator": list, "train_dataset": stream, "eval_dataset": stream}
        if args.deepspeed_plugin is not None:
            AcceleratorState._reset_state()  # of the objective before: DeepSpeed's config is taken only once
        super().__init__(student, args, callbacks=callbacks, **data)
        unset_hf_deepspeed_config()  # which the library has set anew: later models are loaded whole, too
        if self.is_deepspeed_enabled and self.shares_parameters:
            from deepspeed import zero

            # The loss reads the head. Where generate has had it fetched ahead, DeepSpeed 0.19 does not notice that, and
            # it would be empty again in backward.
            for parameter in student.get_output_embeddings().parameters():
                zero.register_external_parameter(student, parameter)
        self.teacher = moved(cast(Any, teacher), args.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.stream = stream
        self.answer: Answering | None = None
        self.evaluation: Callable[[OnPolicyTrainer], dict[str, float]] | None = None  # every ``args.eval_steps`` steps
        self.distillation_objective = objective  # the library has an `objective` of its own
        self.tau = tau
        self.vocab_size = vocab_size
        self.prompts_per_step = args.prompts_per_step
        self.rollout_prompts = rollout_prompts or args.prompts_per_step
        self.drawn: dict[int, Completion] = {}  # by the draw's number: what later steps of the rollout learn from
        self.on_step = on_step
        self.stop_requested = False  # set it, and training ends after the step, with a checkpoint
        self.clock = Clock(args.device)
        self.totals: StepTotals | None = None
        self.completions: list[Completion] = []
        self.per_token: list[Tensor] = []  # of each micro-batch: PER_TOKEN, float32 [B, C, 4]
        self.latest: dict[str, Any] = {}

    @property
    def student(self) -> PreTrainedModel:
        """The model inside of whatever was wrapped around it."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def shares_parameters(self) -> bool:
        """Whether each process holds a part of the student only, so that all must run it together."""
        return self.is_fsdp_enabled or getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and the valid tokens in them on all processes, 0-d."""
        assert self.answer is not None
        self.clock.start()
        with self.clock.part("rollout"):
            draws = [draw for _ in range(num_batches) for draw in next(epoch_iterator)]
            if any(draw.number not in self.drawn for draw in draws):
                ahead = self.until_next_rollout(draws)
                self.drawn = {draw.number: one for draw, one in zip(ahead, self.answer(ahead), strict=True)}
            self.completions = [self.drawn.pop(draw.number) for draw in draws]
        size = self.args.per_device_train_batch_size
        batches = [
            collate(self.completions[start : start + size], self.tokenizer.pad_token_id, device)
            for start in range(0, len(draws), size)
        ]
        if isinstance(self.teacher, ServedTeacher | Teachers):
            self.teacher.ask(self.completions)
        self.totals, self.per_token = StepTotals(self.tau, self.vocab_size, device), []
        self.totals.add("sequences", len(self.completions))
        self.totals.add("clipped", sum(not completion.ended for completion in self.completions))
        tokens = torch.stack([batch.completion_mask.sum() for batch in batches]).sum()
        return [vars(batch) for batch in batches], self.accelerator.reduce(tokens, "sum")

    def until_next_rollout(self, draws: Sequence[Draw]) -> list[Draw]:
        """This process's draws of the steps from this one, whose ``draws`` are, to the rollout's last or the run's."""
        first = self.state.global_step * self.prompts_per_step
        last = min((first // self.rollout_prompts + 1) * self.rollout_prompts, len(self.stream))
        return [self.stream[draw.number + at] for at in range(0, last - first, self.prompts_per_step) for draw in draws]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # makes the folder, which process 0 may not yet have made
        if self.drawn:
            content = json.dumps({number: vars(one) for number, one in self.drawn.items()})
            Path(output_dir, f"rollout-{self.args.process_index}.json").write_text(content, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", f"rollout-{self.args.process_index}.json")
        if checkpoint and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.drawn = {int(number): Completion(**one) for number, one in found.items()}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self.clock.part("student and teacher"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of processes, over which gradients are
        averaged: their sum is that of the global batch."""
        rollouts = Rollouts(**inputs)
        student = self.student

        def forward() -> tuple[Tensor, Any]:
            with self.accelerator.autocast():
                seen = score(
                    student,
                    self.teacher,
                    rollouts,
                    self.distillation_objective,
                    num_items=num_items_in_batch,
                    vocab_size=self.vocab_size,
                    timed=self.clock.part,
                )
            return seen.loss, seen

        loss, seen = inside_forward(model, student, forward)
        assert self.totals is not None
        self.totals.add_tokens(seen, loss, rollouts.completion_mask)
        self.per_token.append(torch.stack([getattr(seen, name).float() for name in PER_TOKEN], dim=-1))
        if isinstance(half := self.distillation_objective.reverse, Sampled):
            self.totals.add("clipped_by_ratio", clipped_by_ratio(half, seen, rollouts.log_probs).sum())
        loss = loss * self.accelerator.num_processes
        return (loss, seen) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *given: Any, **more: Any) -> None:
        """The end of a step, before anything is saved of it. At the end of an epoch it is called once more."""
        if self.totals is not None:
            self.finish_step(self.totals, grad_norm, more.get("learning_rate"))
            self.totals = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *given, **more)

    def finish_step(self, totals: StepTotals, grad_norm: Tensor | float | None, learning_rate: float | None) -> None:
        """Adds the processes up, tells ``on_step``, and ends the run where it has to end."""
        seconds = self.clock.total()
        parts = self.clock.seconds
        device = self.args.device
        # One message: what adds up, and whether any process was asked to stop.
        own = torch.cat([totals.sums, totals.sums.new_tensor([self.stop_requested])])
        summed = self.accelerator.reduce(own, "sum")
        peak = self.accelerator.gather(totals.sums.new_tensor([peak_memory_mib(device)]))
        metrics = totals.metrics(summed[:-1])
        if not isinstance(self.distillation_objective.reverse, Sampled):
            del metrics["clipped_by_ratio"]
        step = self.state.global_step
        if not math.isfinite(summed[totals.places["loss"]].item()):
            raise RunError(f"the loss became {metrics['loss']} at step {step}; try a smaller --learning-rate")
        tokens = metrics["tokens"] or 0
        self.latest = {
            "step": step,
            **metrics,
            "tokens_per_second": tokens / seconds,
            "rollout_seconds": parts["rollout"],
            "teacher_seconds": parts["teacher"],
            "student_seconds": parts["student and teacher"] - parts["teacher"] - parts["loss"],
            "loss_seconds": parts["loss"],
            "loss_share": parts["loss"] / parts["student and teacher"],
            "optimizer_seconds": seconds - parts["rollout"] - parts["student and teacher"],
            "grad_norm": number(grad_norm),
            "learning_rate": learning_rate,
            "peak_memory_mib": peak.max().item(),
        }
        if self.is_world_process_zero():
            self.on_step(self.latest, totals.histograms(summed[:-1]), self.completions)
        if summed[-1].item() > 0:
            self.control.should_training_stop = self.control.should_save = self.stop_requested = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's record of a step with ours beside it."""
        if "grad_norm" in logs:
            logs.update({name: value for name, value in self.latest.items() if value is not None and name != "step"})
        super().log(logs, start_time)

    def figures(self, place: int) -> list[list[float | None]]:
        """PER_TOKEN of each token of this process's completion at ``place`` of the step, rounded."""
        batch, row = divmod(place, self.args.per_device_train_batch_size)
        table = self.per_token[batch][row, : len(self.completions[place].ids)].tolist()
        return [[round(value, 3) if math.isfinite(value) else None for value in values] for values in table]

    def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
        """Of the student as it is; not after the last step, which the run's own evaluation follows."""
        found: dict[str, float] = {}
        if self.evaluation is not None and self.state.global_step < self.state.max_steps:
            found = {f"eval_{name}": value for name, value in self.evaluation(self).items()}
            self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def save_student(self, folder: str) -> None:
        """The student alone, as a folder that ``from_pretrained`` loads; every process takes part."""
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_world_process_zero():
            self.student.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)


class Bar(ProgressCallback):
    """The library's progress bar without its records, which ``on_step`` prints; on a terminal only."""

    def on_log(self, *given: Any, **more: Any) -> None:
        """Nothing."""


def number(value: Any) -> float | None:
    """A gradient norm as a float, also where each process holds a part of it."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return None if value is None else float(value)
