"""The training step: hidden states of both models into the loss, gradients accumulated over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from eopd_kernels import EntropyAwareKLOutput, Objective, entropy_aware_kl

from .errors import RunError
from .models import hidden_states, lm_head
from .rollouts import Rollouts


def score(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: Rollouts,
    objective: Objective,
    *,
    num_items: Tensor | None = None,
    vocab_size: int | None = None,
) -> EntropyAwareKLOutput:
    """The loss of a batch and its figures per token [B, C]; the teacher is scored without gradient.

    ``num_items`` replaces the batch's own count of valid tokens as the denominator.
    """
    # The hidden state at position i predicts token i + 1: the last prompt token's is about the first completion token,
    # and the last completion token's is about nothing that was sampled.
    predicting = slice(rollouts.prompt_width - 1, -1)
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, rollouts.input_ids, rollouts.attention_mask)[:, predicting]
    student_hidden = hidden_states(student, rollouts.input_ids, rollouts.attention_mask)[:, predicting]
    return entropy_aware_kl(
        student_hidden,
        teacher_hidden,
        student_head=lm_head(student),
        teacher_head=lm_head(teacher),
        mask=rollouts.completion_mask,
        num_items=num_items,
        vocab_size=vocab_size,
        objective=objective,
    )


def accumulate_gradients(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    micro_batches: list[Rollouts],
    objective: Objective,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """Adds the gradient of the mean loss over ALL valid tokens of the micro-batches; returns means over those tokens.

    Each micro-batch is divided by the whole step's token count. Dividing each by its own count and averaging would
    weigh the tokens of short completions more, differently for every way of cutting the same batch.
    """
    num_items = torch.stack([batch.completion_mask.sum() for batch in micro_batches]).sum()
    totals: dict[str, Tensor] = {}
    for batch in micro_batches:
        scores = score(student, teacher, batch, objective, num_items=num_items, vocab_size=vocab_size)
        scores.loss.backward()
        parts = {
            "loss": scores.loss.detach(),
            "forward_kl": scores.forward_kl.sum() / num_items,
            "reverse_kl": scores.reverse_kl.sum() / num_items,
            "teacher_entropy": scores.teacher_entropy.sum() / num_items,
            "student_entropy": scores.student_entropy.sum() / num_items,
            "gate_fraction": scores.gate.sum() / num_items,
        }
        totals = {name: totals.get(name, 0) + part for name, part in parts.items()}
    return {name: float(total) for name, total in totals.items()}


def warmed_up(optimizer: Optimizer, warmup: int, steps: int, final: float) -> LambdaLR:
    """A learning rate that rises over ``warmup`` steps, then falls linearly to the fraction ``final`` at ``steps``."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1)) * (1.0 - (1.0 - final) * step / max(1, steps))

    return LambdaLR(optimizer, factor)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    draw_rollouts: Callable[[], Rollouts],
    objective: Objective,
    *,
    steps: int,
    micro_batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    max_grad_norm: float,
    vocab_size: int | None = None,
) -> Iterator[dict[str, float]]:
    """On-policy distillation; trains ``student`` in place and yields the metrics of each optimizer step.

    ``draw_rollouts`` samples one step's sequences from the student as it then is.
    """
    # Without dropout: the distribution that is trained is the one that was sampled from.
    student.eval()
    teacher.eval()
    teacher.requires_grad_(False)
    optimizer = AdamW(student.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = warmed_up(optimizer, warmup_steps, steps, final=0.1)
    for step in range(1, steps + 1):
        started = perf_counter()
        rollouts = draw_rollouts()
        sampled = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        metrics = accumulate_gradients(student, teacher, list(rollouts.split(micro_batch_size)), objective, vocab_size)
        if not math.isfinite(metrics["loss"]):
            raise RunError(f"the loss became {metrics['loss']} at step {step}; try a smaller --learning-rate")
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
        optimizer.step()
        current_rate = float(schedule.get_last_lr()[0])
        schedule.step()
        tokens = int(rollouts.lengths.sum())
        finished = perf_counter()
        yield {
            "step": step,
            **metrics,
            "grad_norm": float(grad_norm),
            "learning_rate": current_rate,
            "completion_length": tokens / len(rollouts.lengths),
            "tokens": tokens,
            "tokens_per_second": tokens / (finished - started),
            "rollout_seconds": sampled - started,
            "update_seconds": finished - sampled,
        }


def train_supervised(
    model: PreTrainedModel,
    draw_batch: Callable[[], tuple[Tensor, Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Next-token training on right answers; trains in place and yields each step's loss (nats per token).

    ``draw_batch`` gives token ids, attention mask and labels, [B, L] each, labels −100 outside the answers.
    """
    model.train()
    optimizer = AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = warmed_up(optimizer, warmup=20, steps=steps, final=0.05)
    for _ in range(steps):
        input_ids, attention_mask, labels = draw_batch()
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    model.eval()
