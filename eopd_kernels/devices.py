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
    if torch.compiler.is_compiling() or not on_host(tensor.device):
        return False
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # whoever has such a tensor has imported it
    return fake is None or not isinstance(tensor, fake.FakeTensor)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which torch.autocast wants matrix products here and now, or None outside of it."""
    name = device.type
    if not torch.amp.is_autocast_available(name) or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)
