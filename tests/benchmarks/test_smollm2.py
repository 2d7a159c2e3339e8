"""A student is its teacher with the damage that its name says; and the real ones, where the weights are installed."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import smollm2
from benchmarks.smollm2 import Damage, deface, problem, text
from benchmarks.truth import truth


def toy() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
    return model


@torch.no_grad()
def test_noise_is_relative_and_of_matrices_only() -> None:
    model, noised = toy(), toy()
    model.model.layers[0].weight.mul_(100)
    noised.model.layers[0].weight.mul_(100)
    deface(noised, Damage(noise=0.1))
    for before, after in zip(model.parameters(), noised.parameters(), strict=True):
        if before.dim() == 2:
            assert 0.08 < float((after - before).std() / before.std()) < 0.12
        else:
            assert torch.equal(before, after)


def test_layers_are_cut_at_the_end() -> None:
    model = toy()
    kept = list(model.model.layers[:4])
    deface(model, Damage(cut=2))
    assert list(model.model.layers) == kept


def test_damages_in_words() -> None:
    assert str(Damage(noise=0.01)) == "weights noised by 0.01" and str(Damage(cut=1)) == "last layer cut"
    assert str(Damage(cut=4)) == "last 4 layers cut"


def test_there_is_enough_text() -> None:
    assert len(text()) > 200_000


def test_weights_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such-package"):
        problem(8, Damage())


def test_a_cut_student_is_farther_from_its_teacher_than_a_noised_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (smollm2.PACKAGE, "gguf", "transformers"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"not installed: {package}")
    transformers = importlib.import_module("transformers")
    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):  # read from the file once
        monkeypatch.setattr(auto, "from_pretrained", copied(auto.from_pretrained))
    noised, cut = (
        truth(problem(8, damage), "reverse", of_head=False).loss for damage in (Damage(noise=0.003), Damage(cut=4))
    )
    assert 0 < 10 * noised < cut


def copied(load: Callable[..., Any]) -> Callable[..., Any]:
    """What ``load`` returned the first time, whatever has been done to it since."""
    kept: list[Any] = []

    def again(*given: Any, **options: Any) -> Any:
        if not kept:
            kept.append(load(*given, **options))
        return copy.deepcopy(kept[0])

    return again
