"""PEFT on an output layer: which weight is in use, differentiable in what the adapter trains. Nothing of peft is
imported; the attributes read are those of peft 0.21."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.data_parallel import is_dtensor


class Update(NamedTuple):
    """What one adapter adds to a layer's weight and bias."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class NotExpressible(Exception):
    """Why an adapter's layer is no weight and bias, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy


def in_use(layer: Any) -> Any:
    """Returns the layer that is applied: of modules_to_save the active copy, any other layer as it is."""
    while hasattr(layer, "original_module") and hasattr(layer, "modules_to_save"):
        active = layer.active_adapters
        off = layer.disable_adapters or not active
        layer = layer.original_module if off else layer.modules_to_save[active[0]]
    return layer


def updates_of(layer: Any) -> list[Update]:
    """Returns the updates of a LoRA layer's active adapters; none where adapters are switched off or merged.

    Raises:
        NotExpressible: it is another kind of adapter, a variant of LoRA, or has dropout in training.
    """
    kind = type(layer).__name__
    if not all(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "lora_dropout", "active_adapters")):
        raise NotExpressible(f"has an adapter on its output layer that is not LoRA (a {kind})", "merge it first")
    if layer.merged:
        if layer.disable_adapters:
            raise NotExpressible("has merged adapters that are switched off", "unmerge them first")
        return []
    if layer.disable_adapters:
        return []
    return [update(layer, name) for name in layer.active_adapters if name in layer.lora_A]


def update(layer: Any, name: str) -> Update:
    """Returns scaling · B·A, computed here: V · r · D products, once per LMHead."""
    if name in layer.lora_variant:
        variant = layer.lora_variant[name]
        kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
        raise NotExpressible(
            f"has an adapter {name!r} on its output layer that is more than LoRA ({kind})", "merge it first"
        )
    dropout = layer.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        raise NotExpressible(
            f"has an adapter {name!r} with dropout {dropout.p:g} on its output layer, in training",
            "set lora_dropout=0, or call eval() on that dropout: a merged weight cannot drop hidden states",
        )
    if layer.fan_in_fan_out:
        raise NotExpressible("has an output layer with fan_in_fan_out", "build an LMHead by hand of its transpose")
    down, up = layer.lora_A[name], layer.lora_B[name]
    if is_dtensor(down.weight) or is_dtensor(up.weight):
        raise NotExpressible(
            f"has a sharded adapter {name!r} on its output layer",
            "call the loss in the forward of the module that fully_shard was applied to",
        )
    bias = None if up.bias is None else up.bias * layer.scaling[name]
    return Update(up.weight @ down.weight * layer.scaling[name], bias)


def merged(weight: Tensor, bias: Tensor | None, updates: list[Update]) -> tuple[Tensor, Tensor | None]:
    """Adds the updates to weight and bias, in the wider of their dtypes: a small update is not rounded away."""
    for of in updates:
        weight = weight + of.weight.to(torch.promote_types(weight.dtype, of.weight.dtype))
        if of.bias is not None:
            bias = of.bias if bias is None else bias + of.bias
    return weight, bias
