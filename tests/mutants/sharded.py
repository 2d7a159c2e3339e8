# ruff: noqa: E501 (a mutant is a line)
"""What is broken of sharded, adapted and selected heads and of denominators."""

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

SELECTED = [
    Mutant("selected: the bias is forgotten", "LMHead.select", "None if self.bias is None else rows_at(self.bias, ids)", "None"),
    Mutant("selected: the bias has no gradient", "LMHead.select", "rows_at(self.bias, ids)", "rows_at(self.bias.detach(), ids)"),
    Mutant("selected: the weight has no gradient", "LMHead.select", "rows_at(self.weight, ids)", "rows_at(self.weight.detach(), ids)"),
    Mutant("selected: scale and softcap are forgotten", "LMHead.select", "return self.with_tensors(", "return LMHead("),
    Mutant("selected: narrow ids", "LMHead.select", "ids.to(self.weight.device, torch.int64)", "ids.to(self.weight.device)"),
    Mutant("selected: ZeRO-3's empty parameter passes", "LMHead.select", '        check_not_partitioned("LMHead.weight", self.weight)\n', ""),
    Mutant("selected: a device is asked for its ids", "check_ids", "if not tensors.readable(ids):", "if False:"),
    Mutant("selected: negative ids", "check_ids", "if low < 0 or high", "if high"),
    Mutant("selected: an id beyond the rows", "check_ids", "high >= vocab_size:", "high > vocab_size:"),
    Mutant("selected: an entry counts twice", "check_ids", ".bincount().max() > 1", ".bincount().max() > 2"),
    Mutant("selected: bools are entries", "check_integer", "if not whole or tensor.dtype == torch.bool:", "if not whole:"),
    Mutant("selected: a shard's rows are whole on each rank", "rows_at", ".redistribute(mesh, placements)", ""),
    Mutant("selected: a shard's rows have no gradient", "rows_at", "tensor.full_tensor()", "tensor.detach().full_tensor()"),
    Mutant("common: the student's ids for both", "common_entries", "(id, teacher[entry])", "(id, id)"),
    Mutant("common: in no order", "common_entries", "sorted((id", "list((id"),
    Mutant("common: on the default device", "common_entries", 'torch.tensor(student_ids, dtype=torch.int64, device="cpu")', "torch.tensor(student_ids, dtype=torch.int64)"),
    Mutant("common: spellings are not compared", "common_entries", "if marks[0] != marks[1]:", "if False:"),
    Mutant("common: a rare mark decides", "marker_of", "counts.most_common(1)[0][0]", "counts.most_common()[-1][0]"),
    Mutant("common: an id of two strings is one of them", "entries_of", " if uses[id] == 1", ""),
]  # fmt: skip
