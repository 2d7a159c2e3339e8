# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the loss under torch.compile."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant("compiled: gradients are not multiplied by what waits", "gradients_of", "factor = outstanding(upstream, later, ctx.forms[0][1][:-1])", "factor = upstream"),
    Mutant("compiled: the upstream gradient is forgotten", "gradients_of", "found = [g * factor for g in stored]", "found = [g / divisor for g in stored]"),
    Mutant("compiled: an input is handed out", "compiled.loss", "if first is None else first.clone()", "if first is None else first"),
    Mutant("compiled: ids are not looked at", "compiled.loss", "    check_vocabulary(tokens, options.objective, options.local_vocab_size)\n", ""),
    Mutant("compiled: the fake says fp32 whatever the inputs", "loss_fake", "dtype = compute_dtype(*inputs) if hidden else arguments.student.dtype", "dtype = torch.float32"),
    Mutant("compiled: backward of open rows visits all", "visited", "host or options.some_weigh_nothing", "options.some_weigh_nothing"),
    Mutant("compiled: a callable gate is written down", "obstacle", "if not isinstance(options.objective.gate, str | EntropyGate | QuantileGate):", "if False:"),
    Mutant("compiled: dynamo traces forward", "EntropyAwareKL", "class EntropyAwareKL(torch.autograd.Function, metaclass=Inlined):", "class EntropyAwareKL(torch.autograd.Function):"),
    Mutant("compiled: torch.func is let through", "EntropyAwareKL.of", "if torch._C._are_functorch_transforms_active():", "if False:"),
]  # fmt: skip

COPIES = [
    Mutant("copies: rows of another", "rows.OPS", "LIBRARY.ns", '"eopd_kernels"'),
    Mutant("copies: another's loss is compiled", "compiled.call", "OPS.loss(", "torch.ops.eopd_kernels.loss("),
    Mutant("copies: another's backward is compiled", "gradients_of", "OPS.loss_backward(", "torch.ops.eopd_kernels.loss_backward("),
]  # fmt: skip
