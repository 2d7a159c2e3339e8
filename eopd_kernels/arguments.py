"""Checks of single arguments: an error names the argument, says what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LONGEST_QUOTE = 80  # characters of a value that an error repeats; of anything longer it says the type

# The dtypes that the kernels read.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def described(value: object) -> str:
    """Describes what came, for an error: dtype, shape and device, a number or a short text, else a type and length.

    Never the numbers of a tensor, nor what a model or its output holds: that would be hundreds of lines.
    """
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"a nested {name} tensor on {value.device}"
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {layout}{name} tensor of shape {tuple(value.shape)} on {value.device}"
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        quoted = repr(value)
        return f"{quoted} of type {kind}" if len(quoted) <= LONGEST_QUOTE else f"a {kind} of {len(quoted)} characters"
    counted = isinstance(value, (tuple, list, dict))
    return f"a {kind} of length {len(value)}" if counted else f"a {kind}"  # type: ignore[arg-type]


def quoted(value: object) -> str:
    """Returns the repr of an option's value where it is short, else what :func:`described` says."""
    if isinstance(value, Tensor) or len(text := repr(value)) > LONGEST_QUOTE:
        return described(value)
    return text


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose numbers do not lie in memory by strides, as every kernel reads them."""
    if tensor.is_nested or tensor.layout != torch.strided:
        remedy = "pad it and pass a mask" if tensor.is_nested else "pass its to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {described(tensor)}: {remedy}")


def check_integer(name: str, tensor: Any) -> None:
    """Refuses what is no dense integer tensor; bools are none."""
    whole = isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex())
    if not whole or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {described(tensor)}")
    check_dense(name, tensor)


def check_floating(name: str, tensor: Any, instead: str = "") -> None:
    """Refuses what is no dense tensor of a dtype that the kernels read; of a non-tensor says what to do ``instead``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {described(tensor)}{instead and f': {instead}'}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {described(tensor)}")
    check_dense(name, tensor)
    if tensor.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {described(tensor)}")


def finite(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """Returns ``value`` as a float; refuses what is no finite number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {described(value)}")
    number = float(value)
    if not -math.inf < number < math.inf or number <= above or number < least or number > most:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        bound += f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuses a ``value`` that is not among those allowed, in type as well."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {quoted(value)}")


def check_whole(name: str, value: Any, allowed: str = "an int") -> None:
    """Refuses a ``value`` that is no int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {allowed}, got {described(value)}")


def positive_int(name: str, value: Any) -> None:
    """Refuses a ``value`` that is no int of at least 1."""
    check_whole(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
