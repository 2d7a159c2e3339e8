# ruff: noqa: E501 (a mutant is a line)
"""What is broken of sharded and adapted heads and of denominators."""

from __future__ import annotations

from .mutant import Mutant

SHARDED, LORA, DENOMINATORS = "eopd_kernels/sharded.py", "eopd_kernels/lora.py", "eopd_kernels/denominators.py"
HEAD, INPUTS = "eopd_kernels/head.py", "eopd_kernels/inputs.py"

MUTANTS = [
    Mutant("sharded: the gradient is summed, not averaged", SHARDED, 'Partial("avg")', 'Partial("sum")'),
    Mutant("sharded: each rank keeps its own gradient", SHARDED, "tensor.full_tensor(grad_placements=[Partial(\"avg\")] * tensor.device_mesh.ndim)", "tensor.full_tensor()"),
    Mutant("sharded: the bias is forgotten", HEAD, "bias = None if self.bias is None else whole(self.bias)", "bias = None"),
    Mutant("sharded: a head is gathered before the checks", INPUTS, "    sparse = dense = None\n", "    sparse = dense = None\n    student_head = student_head and student_head.gathered()\n"),
    Mutant("sharded: ZeRO-3's empty parameter passes", SHARDED, 'if hasattr(weight, "ds_id") and weight.numel() == 0:', "if False:"),
    Mutant("LoRA: the scaling is forgotten", LORA, "up.weight @ down.weight * layer.scaling[name], bias", "up.weight @ down.weight, bias"),
    Mutant("LoRA: every adapter is active", LORA, "in layer.active_adapters if name in layer.lora_A", "in layer.lora_A"),
    Mutant("LoRA: switched off is not looked at", LORA, "    if layer.disable_adapters:\n        return []\n", ""),
    Mutant("LoRA: the adapter has no gradient", LORA, "return Update(up.weight @", "return Update(up.weight.detach() @"),
    Mutant("LoRA: variants are taken for LoRA", LORA, "if name in layer.lora_variant:", "if False:"),
    Mutant("denominators: the average is not undone", DENOMINATORS, "/ (ranks if averaged_over is None else averaged_over)", "/ 1"),
    Mutant("denominators: each rank counts for itself", DENOMINATORS, "dist.all_reduce(count, group=group)", "pass"),
]  # fmt: skip
