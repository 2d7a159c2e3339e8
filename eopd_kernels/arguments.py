"""Checks of single arguments: an error names the argument, says what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor


def described(value: object) -> str:
    """A tensor's dtype, shape and device, or a value and its type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} of type {type(value).__name__}"


def finite(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """``value`` as a float, or a TypeError/ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {described(value)}")
    number = float(value)
    if not -math.inf < number < math.inf or number <= above or number < least or number > most:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        bound += f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """A ValueError unless ``value`` is among the values allowed, in type as well."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def positive_int(name: str, value: Any) -> None:
    """A TypeError/ValueError unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {described(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
