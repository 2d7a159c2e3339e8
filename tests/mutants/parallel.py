# ruff: noqa: E501 (a mutant is a line)
"""What is broken between the ranks of a tensor-parallel group."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant("parallel: every rank begins at entry 0", "offset", "return 0 if self.shard is None else self.shard.offset", "return 0"),
    Mutant("parallel: gates see the shard's vocabulary", "vocab_size", "self.student.local_vocab_size if self.shard is None else self.shard.vocab_size", "self.student.local_vocab_size"),
    Mutant("parallel: sums are not recentred", "FirstVisit.across_ranks", "RowStatistics(self.packed).recentre(student_max, teacher_max)", "RowStatistics(self.packed).recentre(*self.packed[:, 0:3:2].unbind(1))"),
    Mutant("parallel: the fused kernel sees a shard for a row", "fused", "whole_rows = self.shard is None and self.teacher is not None", "whole_rows = self.teacher is not None"),
    Mutant("parallel: mixtures are not summed", "mixture_across_ranks", "if problem.shard is not None and self.mixture is not None:", "if False:"),
    Mutant("parallel: every rank has a top k of its own", "Likeliest.across_ranks", "if problem.shard is None:", "if True:"),
    Mutant("parallel: dX stays partial", "HiddenGradient.__init__", "shard if shard is not None and shard.sums_hidden_gradient else None", "None"),
    Mutant("parallel: dX is summed where it was to stay partial", "HiddenGradient.__init__", "shard if shard is not None and shard.sums_hidden_gradient else None", "shard"),
    Mutant("parallel: a filtered dX stays partial", "FilteredGradient.__init__", "super().__init__(side, needs, block, shard)", "super().__init__(side, needs, block)"),
    Mutant("parallel: the last dX never arrives", "HiddenGradient.tensors", "        self.arrive()\n        if", "        if"),
    Mutant("parallel: one block for two chunks", "chunked_forward_across_ranks", "blocks[i % 2]", "blocks[0]"),
    Mutant("parallel: the teacher goes first, alone", "teacher_statistics", "packed[visited] = teacher_across_ranks(packed[visited], problem.shard)", "pass"),
    Mutant("parallel: padding is compared", "cut_to", "kept.append(max(0, min(size, vocab_size - start)))", "kept.append(size)"),
    Mutant("parallel: shards that differ go on", "shard_of", "    if cut[0] != cut[1]:", "    if False:"),
    Mutant("parallel: a rank plans with its own width", "workspace.tiling", "student.local_vocab_size if shard is None else shard.widest", "student.local_vocab_size", ("tests/schedules/test_schedules.py",)),
]  # fmt: skip

# What ranks tell each other before a call.
EXCHANGED = [
    Mutant("parallel: ranks that differ go on", "check_alike", "    if not others:", "    if True:"),
    Mutant("parallel: options are not compared", "table", "zlib.crc32(repr(sorted(alike.items())).encode())", "zlib.crc32(bytes())"),
    Mutant("parallel: numbers are not compared", "table", "digest(numbers) + options", "0 * digest(numbers) + options"),
    Mutant("parallel: numbers are compared wherever they are", "digest", "    bits.add_(torch.arange(1,", "    bits.add_(0 * torch.arange(1,"),
    Mutant("parallel: the hash of numbers is linear", "digest", "bits.bitwise_xor_(bits >> 31).mul_(", "bits.mul_("),
    Mutant("parallel: the last bit is not compared", "as_integers", "torch.int64 if tensor.dtype == torch.float64 else torch.int32).long()", "torch.int64 if tensor.dtype == torch.float64 else torch.int32).long() & ~1"),
    Mutant("parallel: a GPU asserts sizes alone", "table", " & (rows[:, -1] == fingerprint).all()", ""),
    Mutant("parallel: a rank that refuses says nothing", "checked_among_ranks", "        exchange.refuse()\n", ""),
    Mutant("parallel: a rank that was told tells it again", "table", "        self.begun = True\n", ""),
    Mutant("parallel: nobody listens to a rank that refuses", "check_alike", "    if refused:", "    if False:"),
    Mutant("parallel: the objective is not compared", "alike", '"objective": replace(objective, gate="always"),', '"objective": objective.temperatures,'),
    Mutant("parallel: callable gates are not compared", "alike", 'getattr(objective.gate, "__qualname__", "a callable")', '"a callable"'),
    Mutant("parallel: softcaps are not compared", "agreement.alike.shown", "head.bias is not None, head.scale, head.softcap)", "head.bias is not None)"),
    Mutant("parallel: weights are not compared", "among_ranks", "[call.weights, call.denominator, *said(call).values()]", "[call.denominator, *said(call).values()]"),
    Mutant("parallel: denominators are not compared", "among_ranks", "[call.weights, call.denominator, *said(call).values()]", "[call.weights, *said(call).values()]"),
    Mutant("parallel: ranks that wait and ranks that do not", "alike", '        "wait_free": options.wait_free,\n', ""),
    Mutant("parallel: gradient filters are not compared", "alike", '        "gradient_filter": options.gradient_filter,\n', ""),
    Mutant("parallel: whole vocabularies are shards", "shard_of", "min(sizes) >= vocab_size:", "False:"),
    Mutant("parallel: DTensors of any placement are shards", "local_tensor", " or placements != (Shard(dim % tensor.ndim),):", ":"),
    Mutant("parallel: torch.compile looks into the group", "checked", "torch._dynamo.disable(checked_among_ranks) if torch.compiler.is_compiling() else checked_among_ranks", "checked_among_ranks"),
]  # fmt: skip
