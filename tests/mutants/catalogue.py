# ruff: noqa: E501 (a mutant is a line)
"""What is broken, one line of the package at a time."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: ``original`` occurs exactly once in ``file`` and becomes ``broken``."""

    name: str
    file: str
    original: str
    broken: str


OBJECTIVE, STATISTICS, HEAD = "eopd_kernels/objective.py", "eopd_kernels/statistics.py", "eopd_kernels/head.py"
INPUTS, FUNCTION, LOSS = "eopd_kernels/inputs.py", "eopd_kernels/function.py", "eopd_kernels/loss.py"
SCHEDULES, SIDES, TORCH = "eopd_kernels/schedules.py", "eopd_kernels/sides.py", "eopd_kernels/backends/torch.py"
PRODUCTS, MIXTURE = "eopd_kernels/products.py", "eopd_kernels/mixture.py"
ROW_MATH, BLOCK = "csrc/row_math.h", "csrc/cpu/block.h"
TRITON_MATH, VISITS = "eopd_kernels/backends/triton/row_math.py", "eopd_kernels/backends/triton/visits.py"
NUMBERS, FUSED = "eopd_kernels/backends/triton/numbers.py", "eopd_kernels/backends/triton/loss_and_gradient_kernel.py"
MIXTURE_KERNEL = "eopd_kernels/backends/triton/mixture_kernel.py"
CONVERT, KERNELS, VECTOR = "csrc/cpu/convert.h", "csrc/cpu/kernels.cpp", "csrc/cpu/vector.h"
MIXED_BLOCK = "csrc/cpu/mixture.h"

MUTANTS = [
    Mutant("gate inverted", OBJECTIVE, "teacher_entropy > threshold", "teacher_entropy <= threshold"),
    Mutant("gate opens at the threshold", OBJECTIVE, "teacher_entropy > threshold", "teacher_entropy >= threshold"),
    Mutant("alpha forgotten", OBJECTIVE, "Combine(1.0, 0.0, 0.0, self.alpha)", "Combine(1.0, 0.0, 0.0, 1.0)"),
    Mutant("switch keeps reverse KL", OBJECTIVE, "Combine(1.0, -1.0, 0.0,", "Combine(1.0, 0.0, 0.0,"),
    Mutant("sign of a", OBJECTIVE, "c_f - weighted(c_r,", "c_f + weighted(c_r,"),
    Mutant("factor 2 in b", OBJECTIVE, "(a, upstream * c_r,", "(a, 2 * upstream * c_r,"),
    Mutant("c without the gate", OBJECTIVE, "upstream * c_f)", "upstream)"),
    Mutant("always means never", OBJECTIVE, '-math.inf if self.gate == "always"', 'math.inf if self.gate == "always"'),
    Mutant("merge drops the rescaling of Z", STATISTICS, "c_s * z_s,", "z_s,"),
    Mutant("merge drops the shift of A", STATISTICS, "c_t * (a + z_t * d_t)", "c_t * a"),
    Mutant("merge mixes up the distances", STATISTICS, "z_t * (d_t - d_s)", "z_t * (d_s - d_t)"),
    Mutant("empty parts are not guarded", STATISTICS, "torch.where(part_max == -torch.inf, 0.0, ", "(lambda d: d)("),
    Mutant("columns without mass are not guarded", STATISTICS, "torch.where(mass == 0, 0.0, mass * value)", "mass * value"),
    Mutant("student entropy of the teacher", STATISTICS, "self.packed[:, 6] / self.student_sum", "self.packed[:, 4] / self.student_sum"),
    Mutant("forward KL without the normalisers", STATISTICS, "self.teacher_sum + self.log_sum_ratio", "self.teacher_sum"),
    Mutant("uncentred exponentials", STATISTICS, "maximum, logits - maximum)", "maximum, logits - maximum.mean())"),
    Mutant("count of all tokens", INPUTS, "(weights != 0).sum()", "torch.tensor(weights.numel())"),
    Mutant("count weighs the tokens", INPUTS, "(weights != 0).sum()", "weights.sum()"),
    Mutant("labels inverted", INPUTS, "labels == ignore_index", "labels != ignore_index"),
    Mutant("mask forgotten where there are labels", INPUTS, "0.0, weights)\n    return", "0.0, 1.0)\n    return"),
    Mutant("num_items forgotten", INPUTS, "if num_items is None:\n        count", "if True:\n        count"),
    Mutant("vocabulary off by one", INPUTS, "        return student\n    if isinstance(vocab_size", "        return student - 1\n    if isinstance(vocab_size"),
    Mutant("a gradient under no_grad", INPUTS, "enabled = torch.is_grad_enabled()", "enabled = True"),
    Mutant("teacher's grad accepted", INPUTS, "tensor is not None and tensor.requires_grad:", "False:"),
    Mutant("gradient of the sum for the mean", FUNCTION, "weights=token_weights / denominator", "weights=token_weights"),
    Mutant("backward forgets the fp16 denominator", FUNCTION, "factor = upstream if deferred is None else upstream / deferred", "factor = upstream"),
    Mutant("fp16 gradients are divided in forward", FUNCTION, "denominator if problem.student.gradient_dtype == torch.float16 else None", "None"),
    Mutant("backward forgets upstream", FUNCTION, "g if g is None else g.mul_(factor)", "g"),
    Mutant("recompute forgets the denominator", FUNCTION, "upstream if denominator is None else upstream / denominator\n", "upstream\n"),
    Mutant("recompute divides fp16 gradients first", FUNCTION, "last = factor.dim() == 0 and", "last = False and"),
    Mutant("fp16 gradients forget their factor", FUNCTION, "g.mul_(factor) if last and g is not None else g", "g"),
    Mutant("a GPU compacts masked tokens", FUNCTION, "if devices.on_host(student.device):", "if True:"),
    Mutant("a GPU is asked for its upstream gradient", FUNCTION, "last and devices.on_host(factor.device) and factor == 1", "last and factor == 1"),
    Mutant("autocast is forgotten", FUNCTION, "valid, options.autocast)", "valid)"),
    Mutant("autocast rounds fp64", PRODUCTS, " or logits == torch.float64", ""),
    Mutant("16-bit operands of two kinds", PRODUCTS, "hidden.dtype == weight.dtype else logits", "True else logits"),
    Mutant("a 16-bit gradient has no memory in the budget", SCHEDULES, " + student.gradient_bytes()", ""),
    Mutant("small chunks on a GPU", SCHEDULES, "return GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS", "return GPU_WORKSPACE_BYTES, MIN_TOKENS"),
    Mutant("a GPU upcasts what it multiplies", SIDES, "self.hidden[rows].to(self.gradient_dtype)", "self.hidden[rows].to(self.dtype)"),
    Mutant("recompute forgets the weights", FUNCTION, "token_weights * factor.reshape(-1)", "(token_weights != 0) * factor.reshape(-1)"),
    Mutant("retained gradients are scaled in place", FUNCTION, "last = not torch._C._autograd._get_current_graph_task_keep_graph()", "last = True"),
    Mutant("loss without weights", FUNCTION, "weighted(token_weights, token_loss(", "weighted((token_weights != 0).to(token_weights.dtype), token_loss("),
    Mutant("double backward is silent", FUNCTION, "if torch.is_grad_enabled():\n            gradients", "if False:\n            gradients"),
    Mutant("outputs keep masked tokens", LOSS, "figure.masked_fill(masked, 0.0)", "figure"),
    Mutant("last token of a batch is not visited", SCHEDULES, "start, stop = 0, len(self.weights)", "start, stop = 0, len(self.weights) - 1"),
    Mutant("slices are not merged", SCHEDULES, "else chunk.merge(part)", "else part"),
    Mutant("chunks ignore the budget", SCHEDULES, "tokens = max(logits // vocab_size, min_tokens)", "tokens = n"),
    Mutant("teacher's transform for both", SCHEDULES, "[*self.student.transform, temperature,", "[*self.teacher.transform, temperature,"),
    Mutant("dX of compacted tokens is lost", SIDES, "self.hidden[self.rows] = self.chunk", "pass"),
    Mutant("bias takes the last chunk", SIDES, "self.bias[columns] += gradient", "self.bias[columns] = gradient"),
    Mutant("tail of the vocabulary is not zeroed", SIDES, "self.gradient[..., side.vocab_size :].zero_()", "pass"),
    Mutant("in place without telling autograd", SIDES, "torch.autograd.graph.increment_version(logits)", "pass"),
    Mutant("in place is forgotten", SIDES, "if inplace:", "if False:"),
    Mutant("runs of rows ignore the strides", SIDES, "strides[depth - 1] == sizes[depth] * strides[depth]", "True"),
    Mutant("head's bias forgotten", HEAD, "if self.bias is not None:\n            out", "if False:\n            out"),
    Mutant("dX takes the last panel", HEAD, "products.add_mm(grad_logits[:, part]", "products.mm(grad_logits[:, part]"),
    Mutant("dW takes the last chunk", HEAD, "products.add_mm(grad_logits.t()", "products.mm(grad_logits.t()"),
    Mutant("torch: slope of the transform forgotten", TORCH, "gradient * transform_slope(z_s, transforms[:3])", "gradient"),
    Mutant("torch: slope of the softcap", TORCH, "(temperature / softcap)) ** 2", "(temperature / softcap))"),
    Mutant("torch: off by one column", TORCH, "out[rows, columns] = gradient", "out[rows, columns] = gradient.roll(1, 1)"),
    Mutant("torch: unused rows are not zeroed", TORCH, "torch.where(unused, 0.0, gradient)", "gradient"),
    Mutant("torch: sign of the teacher's term", TORCH, "log_ratio)) - weighted(c, q)", "log_ratio)) + weighted(c, q)"),
    Mutant("mixture: shares mixed up", MIXTURE, "own / mixture, other / mixture", "other / mixture, own / mixture"),
    Mutant("mixture: sign of the forward half's log-ratio", MIXTURE, "skewed(-log_ratio, skews.forward)", "skewed(log_ratio, skews.forward)"),
    Mutant("mixture: the smaller mass is the larger", MIXTURE, "torch.where(x > 0, 1.0, smaller)", "torch.where(x < 0, 1.0, smaller)"),
    Mutant("mixture: no skew is not looked at", MIXTURE, "if skew == 0:", "if False:"),
    Mutant("mixture: columns without mass are not guarded", MIXTURE, "weighted(p, reverse.log_ratio)", "p * reverse.log_ratio"),
    Mutant("torch: the mixture's gradient forgets the share", TORCH, "reverse.log_ratio - reverse.own", "reverse.log_ratio"),
    Mutant("torch: slices of the mixture are not added", TORCH, "packed[rows] += MixtureStatistics", "packed[rows] = MixtureStatistics"),
    Mutant("Triton: merge drops the rescaling of Z", TRITON_MATH, "c_s * student_sum,", "student_sum,"),
    Mutant("Triton: merge drops the shift of P", TRITON_MATH, "teacher_cross + teacher_sum * (d_t - d_s)", "teacher_cross"),
    Mutant("Triton: empty lanes are not guarded", TRITON_MATH, 'tl.where(maximum == float("-inf"), 0.0, maximum - merged_max)', "maximum - merged_max"),
    Mutant("Triton: columns without mass are not guarded", TRITON_MATH, "mass * tl.where(mass == 0, 0.0, value)", "mass * value"),
    Mutant("Triton: sign of Q", TRITON_MATH, "s_cross + per_lane(", "s_cross - per_lane("),
    Mutant("Triton: gate inverted", TRITON_MATH, "teacher_entropy > gate_threshold", "teacher_entropy < gate_threshold"),
    Mutant("Triton: weight forgotten in c", TRITON_MATH, "weight * c_r, weight * c_f", "weight * c_r, c_f"),
    Mutant("Triton: tanh loses its digits near 0", TRITON_MATH, "tl.where(size < TANH_BEND, small, large)", "large"),
    Mutant("Triton: slope of the softcap forgotten", VISITS, "gradient * slope(z_s, inner, outer)", "gradient"),
    Mutant("Triton: the ragged end is masked before the transform", VISITS, 'tl.where(inside, transformed(x, inner, outer, SOFTCAP), float("-inf"))', 'transformed(tl.where(inside, x, float("-inf")), inner, outer, SOFTCAP)'),
    Mutant("Triton: one column too many", VISITS, "inside = columns < end", "inside = columns <= end"),
    Mutant("Triton: writes beside its row", VISITS, "converted(gradient, out.dtype.element_ty), mask=ragged < end)", "converted(gradient, out.dtype.element_ty), mask=ragged < end + 1)"),
    Mutant("Triton: parts overlap", NUMBERS, "tl.minimum(part * columns + columns, vocab_size)", "vocab_size"),
    Mutant("Triton: rows of weight 0 are read", FUSED, "tl.where(weight == 0, 0, vocab_size)", "vocab_size"),
    Mutant("Triton: mixture without the other's weight", TRITON_MATH, "other = (1 - skew) * other_mass", "other = other_mass"),
    Mutant("Triton: mixture overflows without a skew", TRITON_MATH, "if PLAIN:", "if False:"),
    Mutant("Triton: mixture's columns without mass are not guarded", TRITON_MATH, "per_lane(times_or_zero(exp_dt, forward_log))", "per_lane(exp_dt * forward_log)"),
    Mutant("Triton: mixture's gradient forgets the share", TRITON_MATH, "reverse_log - reverse_own", "reverse_log"),
    Mutant("Triton: the mixture's unused teacher term", TRITON_MATH, "other * times_or_zero(tl.exp(dt), forward_other)", "other * tl.exp(dt)"),
    Mutant("Triton: skews exchanged", MIXTURE_KERNEL, "number(forward_skew, dtype), number(reverse_skew, dtype)", "number(reverse_skew, dtype), number(forward_skew, dtype)"),
    Mutant("Triton: the mixture's ragged end is not summed", MIXTURE_KERNEL, "range(0, tl.cdiv(tl.maximum(end - begin, 0), tile))", "range(0, whole)"),
    Mutant("Triton: the mixture's shares over the other sum", MIXTURE_KERNEL, "tl.sum(forward_share, 0) / t_sum", "tl.sum(forward_share, 0) / s_sum"),
    Mutant("C++: merge drops the rescaling of Z", ROW_MATH, "row.student_sum *= c_s;", ""),
    Mutant("C++: merge drops the shift of P", ROW_MATH, "row.teacher_cross + times_or_zero(row.teacher_sum, d_t - d_s)", "row.teacher_cross"),
    Mutant("C++: merge forgets Q", ROW_MATH, "row.student_cross += part.student_cross;", ""),
    Mutant("C++: sign of P", ROW_MATH, "} else {\n    sums.teacher_self += exp_dt * dt;\n    sums.teacher_cross -=", "} else {\n    sums.teacher_self += exp_dt * dt;\n    sums.teacher_cross +="),
    Mutant("C++: guarded loop is not guarded", ROW_MATH, "exp_ds == zero ? zero : exp_ds * log_ratio", "exp_ds * log_ratio"),
    Mutant("C++: gradient of massless columns", ROW_MATH, "gradient = exp_ds == Value{} ? Value{} : gradient;", ""),
    Mutant("C++: sign of c", ROW_MATH, "gradient -= k.other * exp_dt", "gradient += k.other * exp_dt"),
    Mutant("C++: a without the log-ratio's constant", ROW_MATH, "k.a - shift, k.b", "k.a, k.b"),
    Mutant("C++: weight forgotten in b", ROW_MATH, "weight * c_r, weight * c_f}", "c_r, weight * c_f}"),
    Mutant("C++: slope of the transform forgotten", ROW_MATH, "self / row.student_sum * chain,", "self / row.student_sum,"),
    Mutant("C++: mixture: weights do not add up to 1", ROW_MATH, "return {own, 1 - own};", "return {own, Real(0.9999999) - own};"),
    Mutant("C++: mixture: no skew is not looked at", ROW_MATH, "if (skew.own == 0) return {x, zero, one};", ""),
    Mutant("C++: mixture: shares mixed up", ROW_MATH, "own / mixture, other / mixture}", "other / mixture, own / mixture}"),
    Mutant("C++: mixture: columns without mass", ROW_MATH, "times_or_zero(column.exp_dt, forward.lambda)", "column.exp_dt * forward.lambda"),
    Mutant("C++: mixture: sums over the other side's", ROW_MATH, "sums.forward_kl / row.teacher_sum", "sums.forward_kl / row.student_sum"),
    Mutant("C++: mixture: gradient forgets the share", ROW_MATH, "reverse.lambda - reverse.own_share", "reverse.lambda"),
    Mutant("C++: mixture: gradient of massless columns", ROW_MATH, "times_or_zero(column.exp_ds, factor)", "column.exp_ds * factor"),
    Mutant("C++: mixture: log-ratio without the normalisers", MIXED_BLOCK, "(ds - dt) - row.log_sum_ratio", "ds - dt"),
    Mutant("C++: mixture: skews exchanged", MIXED_BLOCK, "skew_of(Real(skews[0])), skew_of(Real(skews[1]))", "skew_of(Real(skews[1])), skew_of(Real(skews[0]))"),
    Mutant("C++: mixture: ragged end is not summed", MIXED_BLOCK, "sum_of_lanes(wide.forward_kl) + narrow.forward_kl", "sum_of_lanes(wide.forward_kl)"),
    Mutant("C++: mixture: unused terms are computed", KERNELS, "mixture_gradient_block(mixed, column_k, k.b != 0,", "mixture_gradient_block(mixed, column_k, true,"),
    Mutant("C++: logarithm: last coefficient", VECTOR, "e * f + 0x1.555554p-2f", "e * f + 0x1.555p-2f"),
    Mutant("C++: ragged end is not summed", BLOCK, "for (; v < count; ++v) add(narrow, Real{}, v);", ""),
    Mutant("C++: suspicious blocks are not repeated", BLOCK, "if (!(trace - trace == 0))", "if (false)"),
    Mutant("C++: kept exponentials are not recentred", BLOCK, "k.self *= student_factor;", ""),
    Mutant("C++: bf16 is cut, not rounded", CONVERT, "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    Mutant("C++: gate inverted", KERNELS, "teacher_entropy(of_row) > gate_threshold ? 1 : 0", "teacher_entropy(of_row) > gate_threshold ? 0 : 1"),
    Mutant("C++: rows of weight 0 are read", KERNELS, "if (weight != 0) {", "{"),
    Mutant("C++: the teacher is transformed as the student", KERNELS, "load_block(problem.teacher, problem.teacher_transform,", "load_block(problem.teacher, problem.student_transform,"),
    Mutant("C++: the last row is forgotten", KERNELS, "row < rows; ++row", "row < rows - 1; ++row"),
]  # fmt: skip
