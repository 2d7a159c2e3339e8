"""What a program sends through its process groups: each collective, with the bytes that a rank puts in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts while it is entered; it sees what autograd starts as well, if backward runs inside of it.

    ``calls`` and ``bytes`` are per name of the collective (``"allreduce_"``, ``"_allgather_base_"``, ...); the bytes
    are those of the tensors that a rank contributes, whatever the algorithm then sends over the wires.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in ("wait_tensor", "barrier"):
                self.calls[name] += 1
                self.bytes[name] += sum(t.nbytes for t in contributed(func, args))
        return func(*args, **(kwargs or {}))


def contributed(func: Any, args: Iterable[Any]) -> list[Tensor]:
    """The tensors that go in: the argument of that name, or the only one there is."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    for name in ("input_tensors", "input_tensor", "inputs", "input", "tensors", "tensor", "self"):
        if name in named:
            return [t for t in torch.utils._pytree.tree_leaves(named[name]) if isinstance(t, Tensor)]
    raise NotImplementedError(f"which argument of {func} goes in? {sorted(named)}")
