"""What is measured on held-out prompts: right answers, and what a student does where the teacher is uncertain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import Objective

from .metrics import StepTotals
from .rollouts import Rollouts, completions, end_of_sequence_ids, sample
from .training import score


def sample_in_batches(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], *, batch_size: int, **sampling: Any
) -> list[Rollouts]:
    """One completion per prompt, ``batch_size`` at a time, in the order of the prompts; the rest is ``sample``'s."""
    starts = range(0, len(prompts), batch_size)
    return [sample(model, tokenizer, prompts[start : start + batch_size], **sampling) for start in starts]


def correctness(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    checks: list[Callable[[str], bool]],
    *,
    samples: int,
    **sampling: Any,
) -> list[list[int]]:
    """Whether each of ``samples`` completions of each prompt is right, 0 or 1, ``[prompts][samples]``.

    ``checks`` has one predicate per prompt; it sees the text before the end of the sequence. An answer that never ends
    is wrong. :mod:`distillation.success` makes Avg@k, Pass@k and their intervals of the matrix.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    eos_ids = end_of_sequence_ids(model, tokenizer)
    batches = sample_in_batches(model, tokenizer, repeated, **sampling)
    texts = [text for rollouts in batches for text in completions(rollouts, tokenizer, eos_ids)]
    return [
        [int(text is not None and check(text)) for text in texts[i * samples : (i + 1) * samples]]
        for i, check in enumerate(checks)
    ]


@torch.no_grad()
def agreement(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    teacher_samples: list[Rollouts],
    *,
    tau: float,
    vocab_size: int,
) -> dict[str, float | None]:
    """Entropies and forward KL (nats) on the teacher's own samples, split at teacher entropy ``tau``.

    A mean over no tokens is None.
    """
    totals = StepTotals(tau, vocab_size, student.device)
    for rollouts in teacher_samples:
        seen = score(student, teacher, rollouts, Objective.forward_kl(), vocab_size=vocab_size)
        totals.add_tokens(seen, seen.loss, rollouts.completion_mask)
    found = totals.metrics(totals.sums)
    return {
        "tokens": found["tokens"],
        "uncertain_fraction": totals.sums[totals.places["tokens_open"]].item() / (found["tokens"] or 1),
        "teacher_entropy_uncertain": found["teacher_entropy_open"],
        "student_entropy_uncertain": found["student_entropy_open"],
        "forward_kl_uncertain": found["forward_kl_open"],
        "forward_kl_certain": found["forward_kl_closed"],
    }
