"""Prompts: from a file, a data set or a built-in task to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedTokenizerBase as Tokenizer

from .errors import UsageError
from .options import PromptOptions
from .report import say, warn

FILES = (".txt", ".jsonl", ".parquet")
ANSWERS = "assistant"  # the role


@dataclass(frozen=True)
class Prompt:
    """Token ids, what they were made of, and what the source says about the answer."""

    ids: list[int]
    text: str
    answer: str | None = None  # the right one, to compare with
    completion: list[int] | None = None  # given, to be learnt from in place of a sampled one
    place: str = ""  # where it stands in the source
    teacher: str = ""  # which of several


def encode_prompts(
    rows: Iterable[tuple[str, dict[str, Any]]], options: PromptOptions, tokenizer: Tokenizer
) -> list[Prompt]:
    """Every different prompt of what :func:`records` found, in the source's order; says what it leaves out."""
    encoded: dict[tuple[Any, ...], Prompt] = {}
    asked = [(question(record, place, options), record, place) for place, record in rows]
    for found, record, place in asked:
        prompt = encode(found, record, place, options, tokenizer)
        encoded.setdefault((prompt.teacher, *prompt.ids), prompt)
    chats = [found for found, _, _ in asked if isinstance(found, list)]
    if answered := sum(chat[-1].get("role") == ANSWERS for chat in chats):
        say(f"{answered} of {len(chats)} chats end with an answer, which is no part of the prompt")
    if len(asked) > len(encoded):
        say(f"{len(asked) - len(encoded)} of {len(asked)} prompts repeat an earlier one and are left out")
    return list(encoded.values())


def warn_of_missing_answers(
    rows: list[tuple[str, dict[str, Any]]], options: PromptOptions, held_out: list[Prompt]
) -> None:
    """Says why nobody will count right answers, where the source might have been expected to hold them."""
    lacking = [prompt.place for prompt in held_out if prompt.answer is None]
    columns = sorted({name for _, record in rows for name in record})
    column = options.answer_column
    if not lacking or (columns == ["prompt"] and column == "answer"):
        return
    where = f"they are {', '.join(lacking[:5])}{' and others' * (len(lacking) > 5)}"
    why = where if column in columns else f"no row has it, the columns are {', '.join(columns)}"
    warn(
        f"--answer-column {column}: {len(lacking)} of {len(held_out)} held-out prompts have no answer, so that right "
        f"ones are not counted; {why}"
    )


def records(options: PromptOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, fields) of each prompt."""
    assert options.prompts is not None
    path = Path(options.prompts)
    if path.suffix == ".txt":
        for number, line in numbered_lines(path):
            yield f"{path}, line {number}", {"prompt": line}
    elif path.suffix == ".jsonl":
        for number, line in numbered_lines(path):
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError("--prompts", f"{place}: not JSON ({error})") from error
            yield place, record if isinstance(record, dict) else {}
    elif path.is_file() and path.suffix != ".parquet":
        raise UsageError("--prompts", f"{str(path)!r} must end in {', '.join(FILES)}")
    elif not path.exists() and (path.suffix in (*FILES, ".json", ".csv") or not on_hub(options.prompts)):
        raise UsageError("--prompts", f"cannot read {str(options.prompts)!r}: there is no such file")
    else:
        for number, record in enumerate(dataset(options), start=1):
            yield f"{options.prompts}, row {number}", record


def on_hub(name: str) -> bool:
    """Whether the hub could have something of this name, which a path like ``./a`` or ``a/b/c`` cannot be."""
    try:
        validate_repo_id(name.partition(":")[0])
    except ValueError:
        return False
    return True


def numbered_lines(path: Path) -> Iterable[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("--prompts", f"cannot read {str(path)!r}: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def dataset(options: PromptOptions) -> Iterable[dict[str, Any]]:
    """The rows of a parquet file, or of a data set by its name (``name`` or ``name:configuration``)."""
    from datasets import load_dataset

    source = str(options.prompts)
    try:
        if source.endswith(".parquet"):
            return load_dataset("parquet", data_files=source, split="train")
        name, _, configuration = source.partition(":")
        return load_dataset(name, configuration or None, split=options.prompts_split)
    except (OSError, ValueError, ConnectionError) as error:  # datasets' own errors are of these kinds
        raise UsageError("--prompts", f"cannot load {source!r}: {error}") from error


def question(record: dict[str, Any], place: str, options: PromptOptions) -> str | list[dict[str, Any]]:
    """What a row asks: a text, or a chat's messages."""
    if options.prompt_column is not None:
        found = record.get(options.prompt_column)
        needed = f"a {options.prompt_column!r} that is a text or a list of messages"
    else:
        found = record.get("prompt", record.get("messages"))
        needed = "a 'prompt' (text) or 'messages' (a list)"
    turns = found if isinstance(found, list) else [{}]
    if not isinstance(found, str | list) or not found or all(turn.get("role") == ANSWERS for turn in turns):
        raise UsageError("--prompts", f"{place}: needs {needed}")
    return found


def encode(
    found: str | list[dict[str, Any]], record: dict[str, Any], place: str, options: PromptOptions, tokenizer: Tokenizer
) -> Prompt:
    """One prompt as token ids: text as it is, a chat (or, with ``chat``, text as a user's turn) by the template."""
    if isinstance(found, str):
        found += options.prompt_suffix
        if options.chat:
            found = [{"role": "user", "content": found}]
    while isinstance(found, list) and found[-1].get("role") == ANSWERS:
        found = found[:-1]
    if isinstance(found, str):
        ids = tokenizer(found)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UsageError("--prompts", f"{place}: is a chat, but neither tokenizer has a chat template")
    else:
        ids = tokenizer.apply_chat_template(
            found, add_generation_prompt=True, tokenize=True, return_dict=False, **options.template_arguments()
        )
    if not ids:
        raise UsageError("--prompts", f"{place}: {found!r} is no token at all for the student's tokenizer")
    text = found if isinstance(found, str) else str(found[-1]["content"])
    right = record.get(options.answer_column)
    answer = None if right is None else str(right).strip() or None
    of = str(record.get(options.teacher_column or "", ""))
    return Prompt(list(ids), text, answer, given(record, place, options, tokenizer), place, of)


def given(record: dict[str, Any], place: str, options: PromptOptions, tokenizer: Tokenizer) -> list[int] | None:
    """The completion that comes with a prompt, ended by the tokenizer's end-of-sequence token."""
    if options.completion_column is None:
        return None
    text = record.get(options.completion_column)
    if not isinstance(text, str) or not text:
        raise UsageError("--completion-column", f"{place}: needs a {options.completion_column!r} (text)")
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
