"""What is measured on held-out prompts: right answers, and what a student does where the teacher is uncertain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import Objective

from .rollouts import Rollouts, completions, end_of_sequence_ids, sample
from .training import score


def sample_in_batches(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> list[Rollouts]:
    """One completion per prompt, ``batch_size`` at a time, in the order of the prompts."""
    return [
        sample(
            model,
            tokenizer,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
        )
        for start in range(0, len(prompts), batch_size)
    ]


def correctness(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    checks: list[Callable[[str], bool]],
    *,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Whether each of ``samples`` completions of each prompt is right, 0 or 1, ``[prompts][samples]``.

    ``checks`` has one predicate per prompt; it sees the text before the end of the sequence. An answer that never ends
    is wrong. :mod:`distillation.success` makes Avg@k, Pass@k and their intervals of the matrix.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    eos_ids = end_of_sequence_ids(model, tokenizer)
    texts: list[str | None] = []
    for rollouts in sample_in_batches(
        model, tokenizer, repeated, batch_size=batch_size, max_new_tokens=max_new_tokens, vocab_size=vocab_size
    ):
        texts += completions(rollouts, tokenizer, eos_ids)
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
    vocab_size: int | None = None,
) -> dict[str, float]:
    """Entropies and forward KL (nats) on the teacher's own samples, split at teacher entropy ``tau``.

    A mean over no tokens is nan.
    """
    columns: dict[str, list[torch.Tensor]] = {"teacher_entropy": [], "student_entropy": [], "forward_kl": []}
    for rollouts in teacher_samples:
        scores = score(student, teacher, rollouts, Objective.forward_kl(), vocab_size=vocab_size)
        for name, values in columns.items():
            values.append(getattr(scores, name)[rollouts.completion_mask])
    scored = {name: torch.cat(values) for name, values in columns.items()}
    uncertain = scored["teacher_entropy"] > tau
    return {
        "tokens": len(uncertain),
        "uncertain_fraction": float(uncertain.float().mean()),
        "teacher_entropy_uncertain": float(scored["teacher_entropy"][uncertain].mean()),
        "student_entropy_uncertain": float(scored["student_entropy"][uncertain].mean()),
        "forward_kl_uncertain": float(scored["forward_kl"][uncertain].mean()),
        "forward_kl_certain": float(scored["forward_kl"][~uncertain].mean()),
    }
