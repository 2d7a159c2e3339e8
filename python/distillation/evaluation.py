"""What is measured on held-out prompts: right answers, and what a student does where the teacher is uncertain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import Objective, TopK

from .metrics import StepTotals
from .rollouts import Rollouts, text_of
from .served_teacher import ServedTeacher, Teacher
from .training import score


def correctness(
    sampled: list[Rollouts], tokenizer: Tokenizer, eos_ids: list[int], checks: list[Callable[[str], bool]]
) -> list[list[int]]:
    """Whether each completion of each prompt is right, 0 or 1, ``[prompts][samples]``.

    ``sampled`` has as many of each prompt, side by side; ``checks`` has one predicate per prompt, which sees the text
    before the end of the sequence. An answer that never ends is wrong. :mod:`distillation.success` makes Avg@k, Pass@k
    and their intervals of the matrix.
    """
    found = [one for rollouts in sampled for one in rollouts.sequences(eos_ids)]
    of_each = [checks[i * len(checks) // len(found)] for i in range(len(found))]
    right = [int(one.ended and check(text_of(one, tokenizer))) for one, check in zip(found, of_each, strict=True)]
    return np.reshape(right, (len(checks), -1)).tolist()


@torch.no_grad()
def agreement(
    student: PreTrainedModel,
    teacher: Teacher,
    teacher_samples: list[Rollouts],
    *,
    tau: float,
    vocab_size: int,
) -> dict[str, float | None]:
    """Entropies and forward KL (nats) on the teacher's own samples, split at teacher entropy ``tau``.

    A mean over no tokens is None. Of a served teacher, with one class for what it does not list, both are lower bounds.
    """
    served = Objective(reverse="none", forward=TopK(teacher="raw", tail=True), gate="always")
    objective = served if isinstance(teacher, ServedTeacher) else Objective.forward_kl()
    totals = StepTotals(tau, vocab_size, student.device)
    for rollouts in teacher_samples:
        seen = score(student, teacher, rollouts, objective, vocab_size=vocab_size)
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
