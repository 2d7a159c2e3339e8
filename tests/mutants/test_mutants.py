"""Every mutant can be made: what it breaks is there exactly once. That it is noticed ``make mutants`` shows."""

from pathlib import Path

import pytest

from .catalogue import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", lambda self, text: len(text))
    errors = []
    for mutant in MUTANTS:
        try:
            mutant.made_in(ROOT)
        except ValueError as error:
            errors.append(str(error))
    assert not errors, "\n".join(errors)


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
