"""Prompts: from a file to token ids, and an endless shuffled stream of batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from .errors import UsageError


def read_prompts(path: Path) -> list[str | list[dict[str, Any]]]:
    """The prompts of a .txt file (one a line) or a .jsonl file: texts, or chats where a line has 'messages'."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError("--prompts", f"{str(path)!r} must end in .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("--prompts", f"cannot read {str(path)!r}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    prompts: list[str | list[dict[str, Any]]] = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError("--prompts", f"{path}, line {number}: not JSON ({error})") from error
        prompt = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
        if not isinstance(prompt, (str, list)) or not prompt:
            raise UsageError("--prompts", f"{path}, line {number}: needs a 'prompt' (text) or 'messages' (a list)")
        prompts.append(prompt)
    return prompts


def encode_prompts(tokenizer: Tokenizer, prompts: list[str | list[dict[str, Any]]]) -> list[list[int]]:
    """Token ids of each prompt, chats through the tokenizer's template; repeated prompts once."""
    encoded: dict[tuple[int, ...], None] = {}
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif tokenizer.chat_template is None:
            raise UsageError("--prompts", "has 'messages', but the student's tokenizer has no chat template")
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        if not ids:
            raise UsageError("--prompts", f"{prompt!r} is no token at all for the student's tokenizer")
        encoded[tuple(ids)] = None
    return [list(ids) for ids in encoded]


def shuffled_batches(prompts: list[list[int]], batch_size: int, seed: int) -> Iterator[list[list[int]]]:
    """Batches without end: every prompt once per round, each round in a new order."""
    rng = random.Random(seed)
    batch: list[list[int]] = []
    while True:
        for prompt in rng.sample(prompts, len(prompts)):
            batch.append(prompt)
            if len(batch) == batch_size:
                yield batch
                batch = []
