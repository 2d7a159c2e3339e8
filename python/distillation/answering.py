"""Where the completions of a step come from: the student, the teacher for some of the prompts, or the prompts' file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .draws import seed_of, uniforms
from .rollouts import Completion, end_of_sequence_ids, sample
from .stream import Draw
from .teachers import Teacher, by_teacher

# A source of completions: one per draw, in their order. Another engine than ``generate`` can stand behind it.
Answering = Callable[[Sequence[Draw]], list[Completion]]


@dataclass
class SampledAnswers:
    """Completions by ``generate``, each with the numbers of its own draw.

    Args:
        student: whatever is to be sampled from; with sharded parameters ``synced`` must be set.
        teacher: answers a share ``off_policy_fraction`` of the prompts, the same ones on any number of processes.
        seed: with a draw's number it decides what is drawn.
        batch_size: completions at a time; None: all that are asked for at once.
        top_p: they are drawn from the likeliest tokens that have this share of the probability.
        autocast: entered while a model writes, so that it computes as it does in the loss.
    """

    student: PreTrainedModel
    teacher: Teacher
    tokenizer: Tokenizer
    _: KW_ONLY
    seed: int | str
    max_new_tokens: int
    vocab_size: int
    batch_size: int | None = None
    off_policy_fraction: float = 0.0
    top_p: float = 1.0
    synced: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, draws: Sequence[Draw]) -> list[Completion]:
        found: dict[int, Completion] = {}
        for model, writer in ((self.student, "student"), (self.teacher, "teacher")):
            teachers = writer == "teacher"
            chosen = [draw for draw in draws if self.for_teacher(draw) is teachers]
            size = self.batch_size or max(1, len(chosen))
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                answers = by_teacher(model, part, partial(self.answers, synced=self.synced and not teachers))
                found |= {draw.number: replace(one, writer=writer) for draw, one in zip(part, answers, strict=True)}
        return [found[draw.number] for draw in draws]

    def for_teacher(self, draw: Draw) -> bool:
        if self.off_policy_fraction == 0:
            return False
        return float(uniforms([seed_of("teacher", self.seed, draw.number)], 1)) < self.off_policy_fraction

    def answers(self, model: PreTrainedModel, draws: Sequence[Draw], synced: bool) -> list[Completion]:
        numbers = uniforms((seed_of("tokens", self.seed, draw.number) for draw in draws), self.max_new_tokens)
        with self.autocast():
            rollouts = sample(
                model,
                self.tokenizer,
                [draw.prompt.ids for draw in draws],
                max_new_tokens=self.max_new_tokens,
                vocab_size=self.vocab_size,
                numbers=numbers,
                top_p=self.top_p,
                synced=synced,
            )
        return rollouts.sequences(end_of_sequence_ids(model, self.tokenizer))


@dataclass
class Given:
    """The completions that came with the prompts, cut at ``max_new_tokens``."""

    max_new_tokens: int

    def __call__(self, draws: Sequence[Draw]) -> list[Completion]:
        found = []
        for draw in draws:
            ids = draw.prompt.completion
            assert ids is not None
            ended = len(ids) <= self.max_new_tokens
            found.append(Completion(draw.prompt.ids, ids[: self.max_new_tokens], ended, writer="data"))
        return found
