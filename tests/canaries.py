"""Tensors between canary words: what is written beside a tensor, or left unwritten in it, is seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

CANARY, CANARIES = -1.25, 64


class Guarded:
    """Tensors between canary words."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, padding: int = 0) -> Tensor:
        """NaN of ``shape`` in the middle of canaries; with ``padding`` canaries after each row."""
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
        whole = torch.full((2 * CANARIES + rows * (columns + padding),), CANARY, dtype=dtype)
        inner = whole.as_strided((rows, columns), (columns + padding, 1), CANARIES)
        inner.fill_(math.nan)
        self.whole.append((whole, inner))
        return inner if len(shape) > 1 and padding else inner.view(shape)

    def holding(self, values: Tensor, padding: int = 0) -> Tensor:
        return self(tuple(values.shape), values.dtype, padding).copy_(values)

    def check(self) -> None:
        """No canary has changed, and no element was left unwritten."""
        for whole, inner in self.whole:
            assert not inner.isnan().any(), "left an element unwritten"
            count = inner.numel()
            inner.fill_(CANARY)
            assert (whole == CANARY).all(), f"wrote beside a tensor of {count} elements"


@contextmanager
def guarded_tensors() -> Iterator[Guarded]:
    """Tensors between canaries, those that a backend allocates itself included; checked at the end."""
    guard = Guarded()

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **of_triton: Any) -> Tensor:
        if of_triton:
            return torch.empty(shape, dtype=dtype or self.dtype, **of_triton)
        return guard(shape, dtype or self.dtype)

    with (
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", lambda like: guard(tuple(like.shape), like.dtype)),
    ):
        yield guard
    guard.check()
