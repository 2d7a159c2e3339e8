"""Several teachers, of which each prompt has one of its own, beside a single one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eopd_kernels import EntropyAwareKLOutput

from .errors import UsageError
from .prompts import Prompt
from .rollouts import Completion
from .served_teacher import ServedTeacher
from .stream import Draw

Single = PreTrainedModel | ServedTeacher


class Teachers(nn.Module):
    """``named`` teachers; which of them a sequence has, its prompt's token ids say: ``of_prompt``."""

    def __init__(self, named: dict[str, Single], of_prompt: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self.names, self.models, self.of_prompt = list(named), nn.ModuleList(named.values()), of_prompt

    def shares(self, prompts: Sequence[list[int]]) -> list[tuple[Any, list[int]]]:
        """Each teacher of some of the prompts, and their places."""
        names = [self.of_prompt[tuple(ids)] for ids in prompts]
        places = [[i for i, name in enumerate(names) if name == own] for own in self.names]
        return [(model, own) for model, own in zip(self.models, places, strict=True) if own]

    def ask(self, completions: Sequence[Completion]) -> None:
        """Has the servers begin with what they will be asked for."""
        for model, places in self.shares([one.prompt for one in completions]):
            if isinstance(model, ServedTeacher):
                model.ask([completions[i] for i in places])


Teacher = Single | Teachers


def teachers_of(prompts: Sequence[Prompt], names: Collection[str]) -> dict[tuple[int, ...], str]:
    """The name of each prompt's teacher.

    Raises:
        UsageError: a prompt has another one than ``names``, or two.
    """
    found: dict[tuple[int, ...], str] = {}
    for prompt in prompts:
        if prompt.teacher not in names:
            raise UsageError("--teacher-column", f"{prompt.place}: {prompt.teacher!r} is none of {', '.join(names)}")
        if found.setdefault(tuple(prompt.ids), prompt.teacher) != prompt.teacher:
            raise UsageError("--teacher-column", f"{prompt.place}: another row has the same prompt and another teacher")
    return found


def by_teacher(
    teacher: Teacher, draws: Sequence[Draw], answer: Callable[[Any, list[Draw]], list[Completion]]
) -> list[Completion]:
    """What ``answer`` makes of each teacher and its draws, in their order."""
    if not isinstance(teacher, Teachers):
        return answer(teacher, list(draws))
    found: dict[int, Completion] = {}
    for model, places in teacher.shares([draw.prompt.ids for draw in draws]):
        found |= zip(places, answer(model, [draws[i] for i in places]), strict=True)
    return [found[i] for i in range(len(draws))]


class Together:
    """The outputs of several calls as one: ``loss`` is their sum, a figure of a sequence is in its place."""

    def __init__(self, outputs: list[EntropyAwareKLOutput], places: list[list[int]]) -> None:
        self.outputs, self.order = outputs, torch.tensor([i for own in places for i in own]).argsort()

    def __getattr__(self, name: str) -> Any:
        found = [getattr(one, name) for one in self.outputs]
        if name == "loss":
            return torch.stack(found).sum()
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)[self.order.to(found[0].device)]
        return any(found)  # whether an entropy is a lower bound
