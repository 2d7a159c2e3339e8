"""What is evaluated with: prompts held out of the training prompts, and sets of their own, each under its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UsageError
from .options import Options, PromptOptions
from .prompts import FILES, records

HELD_OUT = "held-out"  # of the training prompts
# Data set, split, column of the prompt; the answer's is "answer". Programs that read them have them so: none of the
# four has been read from the hub here, for want of one.
HUB_SETS = {
    "MATH-500": ("HuggingFaceH4/MATH-500", "test", "problem"),
    "AIME-2024": ("HuggingFaceH4/aime_2024", "train", "problem"),
    "AIME-2025": ("math-ai/aime25", "test", "problem"),
    "AMC23": ("math-ai/amc23", "test", "question"),
}


def evaluation_sets(options: Options) -> Iterator[tuple[str, PromptOptions, list[tuple[str, dict[str, Any]]]]]:
    """(name, how its prompts are made, rows) of each of ``--eval-sets``: ``NAME``, ``SOURCE`` or ``NAME=SOURCE``."""
    names = {HELD_OUT}
    for word in options.run.eval_sets or []:
        name, _, source = word.partition("=")
        if not source and name not in HUB_SETS:
            name, source = (Path(word).stem if word.endswith(FILES) else word), word
        if name in names:
            raise UsageError("--eval-sets", f"{name!r} is the name of two sets; NAME=SOURCE gives one another")
        names.add(name)
        prompts, split = evaluated(options.prompts), "test"
        if name in HUB_SETS:
            of_hub, split, column = HUB_SETS[name]
            prompts, source = replace(prompts, prompt_column=column, answer_column="answer"), source or of_hub
        prompts = replace(prompts, prompts=source, prompts_split=split)
        try:
            yield name, prompts, list(records(prompts))
        except UsageError as error:
            problem = str(error).removeprefix(f"argument {error.argument}: ")
            raise UsageError("--eval-sets", f"{name}: {problem}; {name}=FILE reads it from a file") from error


def evaluated(prompts: PromptOptions) -> PromptOptions:
    """As training prompts are made, but for the suffix; nothing is left out for its length, and nothing is given."""
    suffix = prompts.prompt_suffix if prompts.eval_prompt_suffix is None else prompts.eval_prompt_suffix
    return replace(prompts, prompt_suffix=suffix, completion_column=None, max_prompt_tokens=None)
