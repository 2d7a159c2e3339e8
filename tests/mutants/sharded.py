# ruff: noqa: E501 (a mutant is a line)
"""What is broken of sharded and adapted heads and of denominators."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant("sharded: the gradient is summed, not averaged", "whole", 'Partial("avg")', 'Partial("sum")'),
    Mutant("sharded: each rank keeps its own gradient", "whole", "tensor.full_tensor(grad_placements=[Partial(\"avg\")] * tensor.device_mesh.ndim)", "tensor.full_tensor()"),
    Mutant("sharded: the bias is forgotten", "LMHead.gathered", "bias = None if self.bias is None else whole(self.bias)", "bias = None"),
    Mutant("sharded: a head is gathered before the checks", "checked_here", "    served = dense = None\n", "    served = dense = None\n    student_head = student_head and student_head.gathered()\n"),
    Mutant("sharded: ZeRO-3's empty parameter passes", "check_not_partitioned", 'if hasattr(weight, "ds_id") and weight.numel() == 0:', "if False:"),
    Mutant("LoRA: the scaling is forgotten", "update", "up.weight @ down.weight * layer.scaling[name], bias", "up.weight @ down.weight, bias"),
    Mutant("LoRA: every adapter is active", "updates_of", "in layer.active_adapters if name in layer.lora_A", "in layer.lora_A"),
    Mutant("LoRA: switched off is not looked at", "updates_of", "    if layer.disable_adapters:\n        return []\n", ""),
    Mutant("LoRA: the adapter has no gradient", "update", "return Update(up.weight @", "return Update(up.weight.detach() @"),
    Mutant("LoRA: variants are taken for LoRA", "update", "if name in layer.lora_variant:", "if False:"),
    Mutant("denominators: the average is not undone", "global_num_items", "/ (ranks if averaged_over is None else averaged_over)", "/ 1"),
    Mutant("denominators: each rank counts for itself", "global_num_items", "dist.all_reduce(count, group=group)", "pass"),
]  # fmt: skip
