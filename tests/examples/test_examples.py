"""Every example runs as a user would, and its loss falls; test_llama_factory.py has the one that asks for a file."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.integrations.conftest import in_a_folder_of_its_own, require

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
COMPLETE = [name for name in EXAMPLES if name != "llama_factory.py"]
NEEDS = {"lightning_module.py": "lightning", "trl_distillation.py": "trl"}

__all__ = ["in_a_folder_of_its_own"]  # a fixture, which takes effect by being here


@pytest.mark.parametrize("name", COMPLETE)
def test_the_loss_falls(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS:
        require(NEEDS[name])
    losses = runpy.run_path(str(FOLDER / name), run_name="__main__")["losses"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token" in capsys.readouterr().out


def test_the_list_of_examples_is_complete() -> None:
    page = (FOLDER / "README.md").read_text()
    assert all(f"]({name})" in page for name in EXAMPLES)
