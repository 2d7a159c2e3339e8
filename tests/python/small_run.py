"""A run that takes a second or two: the arguments of the program for two tiny models in folders of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .conftest import tiny_model, tiny_tokenizer, tiny_words

# What may differ between two runs that are the same: times and the memory of the process.
MEASURED = ("tokens_per_second", "peak_memory_mib", "loss_share")


def arguments(folder: Path, *more: str) -> list[str]:
    """Models and prompts, saved under ``folder``, and a configuration; ``more`` may overrule it."""
    for seed, name in enumerate(("teacher", "student")):
        if not (folder / name).exists():
            torch.manual_seed(seed)
            tiny_model("llama").save_pretrained(folder / name)
            tiny_tokenizer(tiny_words()).save_pretrained(folder / name)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"w{3 + i % 30} w{3 + i * 7 % 30}{' w9' * (i % 4)}\n" for i in range(30)))
    given = {
        "teacher": folder / "teacher",
        "student": folder / "student",
        "prompts": prompts,
        "tau": 3.1,  # in the middle of this teacher's entropies
        "max-steps": 6,
        "per-device-train-batch-size": 2,
        "gradient-accumulation-steps": 4,
        "max-new-tokens": 6,
        "learning-rate": 0.01,
        "warmup-steps": 2,
        "save-steps": 2,
        "eval-prompts": 4,
        "histogram-steps": 2,
        "use-cpu": "true",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what is measured by the clock."""
    return {key: value for key, value in record.items() if key not in MEASURED and not key.endswith("_seconds")}
