"""Tiny models that the trainers of other libraries train, and where these put their files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.python.conftest import VOCABULARY, tiny_model, tiny_tokenizer, tiny_words


def require(package: str) -> None:
    """Skips the test where a library is not installed. One that is installed and cannot be imported fails it."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[integrations]'")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write where they stand unless told otherwise; and none of them may ask a hub, or report anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Optimisers and models of other libraries call torch.empty and operations without a deterministic twin.
    torch.use_deterministic_algorithms(False)


def tiny_pair(student: str = "llama", teacher: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher of one vocabulary, the teacher wider, the same at every call."""
    torch.manual_seed(0)
    models = tiny_model(student), tiny_model(teacher, hidden_size=24)
    return models


def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tiny_words(VOCABULARY))
