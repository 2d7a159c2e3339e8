"""What kind of device a tensor is on, asked in one place, so that a test can pretend to have a GPU."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def kind(device: torch.device) -> str:
    """ "cpu", "cuda" (CUDA and HIP), ...; what differs between kinds is written where it matters."""
    return device.type


def on_host(device: torch.device) -> bool:
    """Whether Python may look at the numbers without waiting for a device."""
    return kind(device) == "cpu"


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's numbers now: they exist, and no device has to be waited for."""
    return not torch.compiler.is_compiling() and on_host(tensor.device) and has_numbers(tensor)


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape, as those are that tracers and planners of memory send through."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # whoever has such a tensor has imported it
    return not tensor.is_meta and (fake is None or not isinstance(tensor, fake.FakeTensor))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which torch.autocast wants matrix products here and now, or None outside of it."""
    name = device.type
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before torch 2.12.
    if name == "meta" or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)
