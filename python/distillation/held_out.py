"""What is evaluated with: prompts held out of the training prompts, and sets of their own, each under its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UsageError
from .options import Options, PromptOptions
from .prompts import FILES, Prompt, records
from .report import warn


class HubSet(NamedTuple):
    """Where the hub has a set, and its columns."""

    source: str
    split: str
    prompt: str
    answer: str = "answer"


# As programs that read them name splits and columns. None of the four has been read from the hub here, for want of one.
HUB_SETS = {
    "MATH-500": HubSet("HuggingFaceH4/MATH-500", "test", "problem"),
    "AIME-2024": HubSet("HuggingFaceH4/aime_2024", "train", "problem"),
    "AIME-2025": HubSet("math-ai/aime25", "test", "problem"),
    "AMC23": HubSet("math-ai/amc23", "test", "question"),
}
HELD_OUT = "held-out"  # of the training prompts
Rows = list[tuple[str, dict[str, Any]]]


def evaluation_sets(options: Options) -> Iterator[tuple[str, PromptOptions, Rows]]:
    """(name, how its prompts are made, rows) of each of ``--eval-sets``: ``NAME``, ``SOURCE`` or ``NAME=SOURCE``."""
    seen = {HELD_OUT}
    for word in options.run.eval_sets or []:
        name, _, source = word.partition("=")
        if not source and name not in HUB_SETS:
            name, source = (Path(word).stem if word.endswith(FILES) else word), word
        if name in seen:
            raise UsageError("--eval-sets", f"{name!r} is the name of two sets; NAME=SOURCE gives one another")
        seen.add(name)
        prompts, known = evaluated(options.prompts), HUB_SETS.get(name)
        if known is not None:
            prompts = replace(prompts, prompt_column=known.prompt, answer_column=known.answer)
        its = (source, "test") if source or known is None else (known.source, known.split)
        prompts = replace(prompts, prompts=its[0], prompts_split=its[1])
        try:
            yield name, prompts, list(records(prompts))
        except UsageError as error:
            raise UsageError("--eval-sets", f"{name}: {error}; {name}=FILE reads it from a file") from error


def evaluated(prompts: PromptOptions) -> PromptOptions:
    """As training prompts are made, but for the suffix; nothing is left out for its length, and nothing is given."""
    suffix = prompts.prompt_suffix if prompts.eval_prompt_suffix is None else prompts.eval_prompt_suffix
    return replace(prompts, prompt_suffix=suffix, completion_column=None, max_prompt_tokens=None)


def warn_of_trained_on(name: str, held_out: list[Prompt], training: list[Prompt], options: PromptOptions) -> None:
    """Says how many of a set's prompts, suffixes aside, are among the training prompts."""
    known = {prompt.text.removesuffix(options.prompt_suffix) for prompt in training}
    suffix = evaluated(options).prompt_suffix
    if shared := sum(prompt.text.removesuffix(suffix) in known for prompt in held_out):
        warn(f"--eval-sets {name}: {shared} of its {len(held_out)} prompts are trained on as well")
