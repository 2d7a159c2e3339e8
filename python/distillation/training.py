"""The loss of a batch of completions from both models' hidden states, and supervised training for a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW
from tqdm import trange
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from eopd_kernels import EntropyAwareKLOutput, LMHead, Objective, Sampled, entropy_aware_kl

from .models import hidden_states
from .rollouts import Rollouts
from .served_teacher import ServedTeacher
from .teachers import Teacher, Teachers, Together


def score(
    student: PreTrainedModel,
    teacher: Teacher,
    rollouts: Rollouts,
    objective: Objective,
    *,
    num_items: Tensor | int | None = None,
    vocab_size: int | None = None,
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> EntropyAwareKLOutput:
    """The loss of a batch and its figures per token [B, C]; several teachers are scored on their sequences each.

    ``num_items`` replaces the batch's own count of valid tokens as the denominator. ``timed("teacher")`` and
    ``timed("loss")`` are entered while the teacher runs and while the loss does, with its gradients, for a clock.
    """
    # The hidden state at position i predicts token i + 1: the last prompt token's is about the first completion token,
    # and the last completion token's is about nothing that was sampled.
    predicting = slice(rollouts.prompt_width - 1, -1)
    several = isinstance(teacher, Teachers)
    shares: list[tuple[Any, Any]] = [(teacher, slice(None))]
    if isinstance(teacher, Teachers):
        shares = teacher.shares([one.prompt for one in rollouts.sequences([])])
        num_items = rollouts.completion_mask.sum() if num_items is None else num_items
    parts = [rollouts.rows(places) for _, places in shares]
    taught: list[tuple[Any, LMHead | None]] = []
    with torch.no_grad(), timed("teacher"):
        for (one, _), own in zip(shares, parts, strict=True):
            if isinstance(one, ServedTeacher):
                taught.append((one(own), None))
            else:
                hidden = hidden_states(one, own.input_ids, own.attention_mask)[:, predicting]
                taught.append((hidden, LMHead.from_model(one)))
    student_hidden = hidden_states(student, rollouts.input_ids, rollouts.attention_mask)[:, predicting]
    sampled = isinstance(objective.reverse, Sampled)
    with timed("loss"):
        outputs = [
            entropy_aware_kl(
                student_hidden[places],
                side,
                student_head=LMHead.from_model(student),
                teacher_head=head,
                mask=own.completion_mask,
                num_items=num_items,
                vocab_size=vocab_size,
                objective=objective,
                token_ids=own.completion_ids if sampled else None,
                old_log_probs=own.log_probs if sampled else None,
            )
            for own, (side, head), (_, places) in zip(parts, taught, shares, strict=True)
        ]
    return cast(EntropyAwareKLOutput, Together(outputs, [places for _, places in shares])) if several else outputs[0]


def clipped_by_ratio(half: Sampled, seen: EntropyAwareKLOutput, old_log_probs: Tensor | None) -> Tensor:
    """Which tokens have no gradient from ``half`` because a clip of r = p/p_old decides, bool [B, C]."""
    assert seen.student_log_probs is not None and seen.teacher_log_probs is not None and old_log_probs is not None
    ratio, advantage = (seen.student_log_probs - old_log_probs).exp(), seen.teacher_log_probs - old_log_probs
    low = (ratio < 1 - half.clip_low) | (ratio > (half.clip_most or torch.inf))
    return ((advantage > 0) & (ratio > 1 + half.clip_high)) | ((advantage < 0) & low)


def train_supervised(
    model: PreTrainedModel, batches: Iterator[tuple[Tensor, ...]], *, steps: int, learning_rate: float, label: str
) -> None:
    """Next-token training on right answers, in place, with a progress bar called ``label`` on a terminal.

    ``batches`` gives token ids, attention mask and labels, [B, L] each, labels −100 outside the answers.
    """
    model.train()
    optimizer = AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    for _ in trange(steps, desc=label, leave=False, disable=None, dynamic_ncols=True):
        input_ids, attention_mask, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
