"""What ``--objective`` may be: a preset of the library by its name, or a YAML block of an Objective's fields."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import yaml

from eopd_kernels import EntropyGate, Objective, QuantileGate, Sampled, Skewed, TopK

from .errors import UsageError

MADE_BY = {
    name: getattr(Objective, name) for name, member in vars(Objective).items() if isinstance(member, classmethod)
}
PRESETS = {name.replace("_", "-"): make for name, make in MADE_BY.items()}
PRESETS |= {"entropy-aware": Objective.eopd, "paper": Objective.eopd_paper}
BOTH = ("reverse-kl", "entropy-aware")
PARTS = {"gate": (EntropyGate, QuantileGate), "reverse": (Sampled, TopK, Skewed), "forward": (TopK, Skewed)}


def objectives(text: str, *, tau: float, alpha: float, combine: Any, temperature: float) -> dict[str, Objective]:
    """The objectives to train with, in their order, by the names of the runs.

    Args:
        text: a preset's name; ``both``; or YAML, ``{preset: jsd, beta: 0.1}`` or an Objective's fields, of which gate,
            reverse and forward may be blocks too: ``{forward: {k: 8, teacher: raw, tail: true}, gate: always}``. It may
            have a ``name``, and says all the rest itself.
        tau, alpha, combine: of named presets with an entropy gate.
        temperature: of named presets.

    Raises:
        UsageError: there is no such preset or field, a value is refused, or one beside ``text`` would have no effect.
    """
    changed = [*["alpha"] * (alpha != 1), *["combine"] * (combine != "add"), *["temperature"] * (temperature != 1)]
    try:
        block = yaml.safe_load(text)
        if isinstance(block, dict):
            name = str(block.pop("name", block.get("preset", "own")))
            if changed or not name.replace("-", "").isalnum():
                wrong = f"--{changed[0]} has no effect on" if changed else f"the name {name!r} is more than letters in"
                raise ValueError(f"{wrong} a block")
            return {name: from_block(**block)}
        found = {name: from_block(name, temperature=temperature) for name in (BOTH if block == "both" else (block,))}
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError("--objective", " ".join(str(error).split())) from error
    gated = {
        name: replace(one, gate=EntropyGate(tau), alpha=alpha, combine=combine)
        for name, one in found.items()
        if isinstance(one.gate, EntropyGate)
    }
    if not gated and changed and changed[0] != "temperature":
        raise UsageError(f"--{changed[0]}", f"has no effect on the objective {text!r}, which has no gate")
    return found | gated


def from_block(preset: str | None = None, **block: Any) -> Objective:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"{preset!r} is no preset, those are both, {', '.join(sorted(PRESETS))}")
    make = Objective if preset is None else PRESETS[preset]
    takes = inspect.signature(make).parameters
    if unknown := [name for name in block if name not in takes]:
        raise ValueError(f"{preset or 'a block'} takes no {unknown[0]!r}, but {', '.join(takes)}")
    return make(**{name: part(name, value) for name, value in block.items()})


def part(name: str, value: Any) -> Any:
    """A field's value; a block becomes the first class that has all of its fields."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    kinds = {kind: [one.name for one in fields(kind)] for kind in PARTS.get(name, ())}
    for kind, known in kinds.items():
        if set(value) <= set(known):
            return kind(**value)
    raise ValueError(f"{name} takes no block of {', '.join(map(str, value))}, but of some of {list(kinds.values())}")
