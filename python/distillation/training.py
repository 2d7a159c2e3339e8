"""The loss of a batch of completions from both models' hidden states, and supervised training for a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from eopd_kernels import EntropyAwareKLOutput, LMHead, Objective, Sampled, entropy_aware_kl

from .models import hidden_states
from .rollouts import Rollouts


def untimed(part: str) -> AbstractContextManager[None]:
    return nullcontext()


def score(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: Rollouts,
    objective: Objective,
    *,
    num_items: Tensor | int | None = None,
    vocab_size: int | None = None,
    timed: Callable[[str], AbstractContextManager[None]] = untimed,
) -> EntropyAwareKLOutput:
    """The loss of a batch and its figures per token [B, C]; the teacher is scored without gradient.

    ``num_items`` replaces the batch's own count of valid tokens as the denominator. ``timed("teacher")`` and
    ``timed("loss")`` are entered while the teacher runs and while the loss does, with its gradients, for a clock.
    """
    # The hidden state at position i predicts token i + 1: the last prompt token's is about the first completion token,
    # and the last completion token's is about nothing that was sampled.
    predicting = slice(rollouts.prompt_width - 1, -1)
    with torch.no_grad(), timed("teacher"):
        teacher_hidden = hidden_states(teacher, rollouts.input_ids, rollouts.attention_mask)[:, predicting]
    student_hidden = hidden_states(student, rollouts.input_ids, rollouts.attention_mask)[:, predicting]
    sampled = isinstance(objective.reverse, Sampled)
    with timed("loss"):
        return entropy_aware_kl(
            student_hidden,
            teacher_hidden,
            student_head=LMHead.from_model(student),
            teacher_head=LMHead.from_model(teacher),
            mask=rollouts.completion_mask,
            num_items=num_items,
            vocab_size=vocab_size,
            objective=objective,
            token_ids=rollouts.completion_ids if sampled else None,
            old_log_probs=rollouts.log_probs if sampled else None,
        )


def warmed_up(optimizer: Optimizer, warmup: int, steps: int, final: float) -> LambdaLR:
    """A learning rate that rises over ``warmup`` steps, then falls linearly to the fraction ``final`` at ``steps``."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1)) * (1.0 - (1.0 - final) * step / max(1, steps))

    return LambdaLR(optimizer, factor)


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
