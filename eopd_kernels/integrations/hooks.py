"""Checks that a library still has the hook that an adapter was written for."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any


class HookMoved(RuntimeError):
    """A library is installed, but what an adapter replaces or is called by in it is not what the adapter expects."""


def installed_version(package: str) -> str:
    """The version of a distribution, or words for its absence."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def find(package: str, tested: str, module: str, name: str) -> Any:
    """``module.name``, where ``name`` may have dots.

    Args:
        package: the distribution, for the message.
        tested: the version that the adapter was tested with, for the message.

    Raises:
        ImportError: the module cannot be imported because the library, or something that it needs, is absent.
        HookMoved: the module or the name in it is gone.
    """
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing part of the library has moved; a missing library has to be installed.
        if error.name is None or "." not in error.name or not module.startswith(error.name):
            raise
        raise moved(package, tested, f"{module} is gone") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise moved(package, tested, f"{module} has no {name}")
        found = getattr(found, part)
    return found


def check_parameters(
    package: str, tested: str, hook: str, function: Callable[..., Any], expected: Sequence[str]
) -> None:
    """A :class:`HookMoved` unless the parameters of ``function``, ``self`` aside, are those expected, in order."""
    found = [name for name in inspect.signature(function).parameters if name != "self"]
    if found != list(expected):
        raise moved(package, tested, f"{hook} takes ({', '.join(found)}), expected ({', '.join(expected)})")


def check_caller(package: str, tested: str, caller: str, function: Callable[..., Any], name: str) -> None:
    """A :class:`HookMoved` unless ``function`` looks ``name`` up when it is called, so that a replacement is seen."""
    if name not in inspect.unwrap(function).__code__.co_names:
        raise moved(package, tested, f"{caller} does not call {name} any more")


def moved(package: str, tested: str, what: str) -> HookMoved:
    return HookMoved(
        f"{package} {installed_version(package)} is not what this adapter was written for ({package} {tested}): {what}"
    )
