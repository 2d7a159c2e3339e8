"""Errors that end the program with one line."""

from __future__ import annotations


class RunError(Exception):
    """Something that a person can act on; its text is one line."""


class UsageError(RunError):
    """A bad argument: named, with what was given and what is allowed."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"argument {argument}: {problem}")
        self.argument = argument


class Interrupted(Exception):
    """The run was asked to stop, and did so after a step, with a checkpoint."""
