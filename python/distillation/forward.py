"""Anything at all inside a wrapped module's forward: DDP's, FSDP's and DeepSpeed's hooks run as for its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")


def inside_forward(wrapper: nn.Module, module: nn.Module, function: Callable[[], Result]) -> Result:
    """``function()`` as ``module``'s forward, called through ``wrapper``, which is around it (or is it).

    DistributedDataParallel arms the reduction of gradients in its forward, and a sharded module gathers its parameters
    there. The loss is computed in there as well, so that the head's weight is whole while it is read. The result is a
    tensor or a tuple that begins with one, so that FSDP finds what backward starts from.
    """
    own = {name: value for name, value in vars(module).items() if name == "forward"}  # accelerate's, in mixed precision

    def forward(*args: Any, **kwargs: Any) -> Result:
        restore()
        return function()

    def restore() -> None:
        vars(module).pop("forward", None)
        vars(module).update(own)

    module.__dict__["forward"] = forward
    try:
        return wrapper()
    finally:
        restore()
