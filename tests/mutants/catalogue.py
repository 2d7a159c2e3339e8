# ruff: noqa: E501 (a mutant is a line)
"""What is broken, one line of the package at a time."""

from __future__ import annotations

from .compiled import MUTANTS as COMPILED
from .gradient_filter import MUTANTS as GRADIENT_FILTER
from .inputs import MUTANTS as INPUTS_OF_ALL_KINDS
from .integrations import MUTANTS as INTEGRATIONS
from .mutant import Mutant, noticed_by
from .objectives import MUTANTS as OBJECTIVES
from .parallel import EXCHANGED
from .parallel import MUTANTS as PARALLEL
from .sharded import MUTANTS as SHARDED
from .tokens import ADVANTAGES, ALIGNED, AMONG_RANKS, IN_A_GRAPH, MEANS
from .tokens import MUTANTS as TOKENS

OBJECTIVE, STATISTICS, HEAD = (
    "eopd_kernels/objective/objective.py",
    "eopd_kernels/row_math/statistics.py",
    "eopd_kernels/heads/lm_head.py",
)
TOKEN_INPUTS, FP16_RULE = "eopd_kernels/inputs/per_token.py", "eopd_kernels/schedules/fp16.py"
INPUTS, FUNCTION, LOSS = "eopd_kernels/inputs/check.py", "eopd_kernels/function.py", "eopd_kernels/loss.py"
SCHEDULES, SIDES, TORCH = (
    "eopd_kernels/schedules.py",
    "eopd_kernels/schedules/sides.py",
    "eopd_kernels/backends/torch.py",
)
GATES = "eopd_kernels/objective/gates.py"
PROBLEM, FIGURES = "eopd_kernels/schedules/problem.py", "eopd_kernels/schedules/first_visit.py"
PRODUCTS, MIXTURE = "eopd_kernels/heads/products.py", "eopd_kernels/row_math/mixture.py"
ROW_MATH, BLOCK = "csrc/row_math.h", "csrc/cpu/block.h"
TRITON_MATH, VISITS = "eopd_kernels/backends/triton/row_math.py", "eopd_kernels/backends/triton/visits.py"
NUMBERS, FUSED = "eopd_kernels/backends/triton/numbers.py", "eopd_kernels/backends/triton/loss_and_gradient_kernel.py"
MIXTURE_KERNEL = "eopd_kernels/backends/triton/mixture_kernel.py"
CONVERT, KERNELS, VECTOR = "csrc/cpu/convert.h", "csrc/cpu/kernels.cpp", "csrc/cpu/vector.h"
MIXED_BLOCK = "csrc/cpu/mixture.h"
CUDA_ROW, CUDA_CHIP, CUDA_MERGE = "csrc/cuda/row.cuh", "csrc/cuda/on_chip.cuh", "csrc/cuda/merge.cuh"
CUDA_KERNELS, CUDA_COLUMNS = "csrc/cuda/kernels.cuh", "csrc/cuda/columns.cuh"
CUDA_VISITS, CUDA_MIXTURE = "csrc/cuda/visits.cuh", "csrc/cuda/mixture.cuh"
CUDA_MIXTURE_KERNELS = "csrc/cuda/mixture_kernels.cuh"
CUDA_STORAGE, CUDA_NUMBERS, CUDA_LAUNCH = "csrc/cuda/storage.cuh", "csrc/cuda/numbers.cuh", "csrc/cuda/launchers.cuh"
CUDA_BACKEND, PLAN = "eopd_kernels/backends/cuda/__init__.py", "eopd_kernels/backends/cuda/plan.py"
ROWS = "eopd_kernels/rows.py"
TENSOR_PARALLEL = tuple(f"tests/distributed/test_tensor_parallel{part}.py" for part in ("_failures", "_costs", ""))
EXCHANGE = tuple(f"tests/distributed/test_tensor_parallel_{part}.py" for part in ("agreement", "logits", "compile"))

MUTANTS = [
    *OBJECTIVES,
    *noticed_by(("tests/test_compile.py",), COMPILED),
    *noticed_by(("tests/schedules/test_gradient_filter.py",), GRADIENT_FILTER),
    *noticed_by(TENSOR_PARALLEL, PARALLEL),
    *noticed_by(EXCHANGE, EXCHANGED),
    *noticed_by(("tests/test_token_log_probs.py",), TOKENS),
    *noticed_by(("tests/test_means.py",), MEANS),
    *noticed_by(("tests/inputs/test_shifted.py", "tests/inputs/test_per_token.py"), ALIGNED),
    *noticed_by(("tests/test_advantages.py", "tests/inputs/test_per_token.py"), ADVANTAGES),
    *noticed_by(TENSOR_PARALLEL, AMONG_RANKS),
    *noticed_by(("tests/test_opcheck.py", "tests/test_compile_options.py"), IN_A_GRAPH),
    *INPUTS_OF_ALL_KINDS,
    *noticed_by(("tests/integrations",), INTEGRATIONS),
    *noticed_by(
        (
            "tests/heads/test_lora.py",
            "tests/heads/test_lm_head.py",
            "tests/distributed/test_data_parallel.py",
            "tests/distributed/test_num_items.py",
        ),
        SHARDED,
    ),
    Mutant("gate inverted", "exceeds", "torch.where(entropy.isnan(), entropy, (entropy > threshold)", "torch.where(entropy.isnan(), entropy, (entropy <= threshold)"),
    Mutant("gate opens at the threshold", "exceeds", "(entropy > threshold).to(entropy.dtype)", "(entropy >= threshold).to(entropy.dtype)"),
    Mutant("alpha forgotten", "combination", "else self.alpha * self.loss_factor", "else self.loss_factor"),
    Mutant("switch keeps reverse KL", "combination", '"switch": -rho', '"switch": 0.0'),
    Mutant("sign of a", "formulas.gated_coefficients", "c_f - times_or_zero(c_r,", "c_f + times_or_zero(c_r,"),
    Mutant("factor 2 in b", "formulas.gated_coefficients", "(a, upstream * c_r,", "(a, 2 * upstream * c_r,"),
    Mutant("c without the gate", "formulas.gated_coefficients", "upstream * c_f)", "upstream)"),
    Mutant("always means never", "gate_threshold", '-math.inf if self.gate == "always"', 'math.inf if self.gate == "always"'),
    Mutant("merge drops the rescaling of Z", "RowStatistics.recentre", "c_s * z_s,", "z_s,"),
    Mutant("merge drops the shift of A", "RowStatistics.recentre", "times_or_zero(c_t, a + z_t * d_t)", "times_or_zero(c_t, a)"),
    Mutant("merge mixes up the distances", "RowStatistics.recentre", "z_t * (d_t - d_s)", "z_t * (d_s - d_t)"),
    Mutant("empty parts are not guarded", "statistics.distance", "torch.where(part_max == -torch.inf, 0.0, ", "(lambda d: d)("),
    Mutant("columns without mass are not guarded", "statistics.times_or_zero", "torch.where(mass == 0, 0.0, mass * value)", "mass * value"),
    Mutant("student entropy of the teacher", "student_entropy", "self.packed[:, 6] / self.student_sum", "self.packed[:, 4] / self.student_sum"),
    Mutant("forward KL without the normalisers", "RowStatistics.forward_kl", "self.teacher_sum + self.log_sum_ratio", "self.teacher_sum"),
    Mutant("uncentred exponentials", "statistics.finite_centre", "-torch.inf, 0.0, maximum)", "-torch.inf, 0.0, maximum.mean())"),
    Mutant("count of all tokens", "denominator", "(weights != 0).sum()", "torch.tensor(weights.numel())"),
    Mutant("count weighs the tokens", "denominator", "(weights != 0).sum()", "weights.sum()"),
    Mutant("labels inverted", "token_weights", "labels.long() == ignore_index", "labels.long() != ignore_index"),
    Mutant("mask forgotten where there are labels", "token_weights", "0.0, weights)\n    if mask", "0.0, 1.0)\n    if mask"),
    Mutant("num_items forgotten", "denominator", "if num_items is None:\n        count", "if True:\n        count"),
    Mutant("vocabulary off by one", "common_vocabulary", "        return of_student\n    if not 1", "        return of_student - 1\n    if not 1"),
    Mutant("a gradient under no_grad", "needs_gradient", "enabled = torch.is_grad_enabled()", "enabled = True"),
    Mutant("teacher's grad accepted", "refuse_gradient", "if not tensor.requires_grad:", "if True:"),
    Mutant("gradient of the sum for the mean", "solve", "problem.weights if denominator is None else problem.weights / denominator", "problem.weights"),
    Mutant("backward forgets what waits in fp16", "outstanding", "factor = upstream * later", "factor = upstream * (later != 0)"),
    Mutant("fp16 gradients are divided in forward", "solve", "        if problem.student.gradient_dtype == torch.float16:\n", "        if False:\n"),
    Mutant("backward forgets upstream", "backward_chunked", "torch.mul(g, factor, out=g if last else torch.empty_like(g))", "g"),
    Mutant("recompute forgets the denominator", "solve_again", "upstream if call.denominator is None else upstream / call.denominator\n", "upstream\n"),
    Mutant("recompute divides fp16 gradients first", "solve_again", "if problem.student.gradient_dtype == torch.float16 and isinstance(problem.student, HiddenSide):", "if False:"),
    Mutant("fp16 gradients forget their factor", "solve_again", "else g.mul_(later) for g", "else g for g"),
    Mutant("a GPU compacts masked tokens", "problem_of", "if readable(weights):", "if True:"),
    Mutant("a GPU is asked for its upstream gradient", "backward_chunked", "tensors.readable(factor) and factor == 1", "factor == 1"),
    Mutant("autocast is forgotten", "side", "HiddenSide(tensor, head, size, valid, options.autocast)", "HiddenSide(tensor, head, size, valid)"),
    Mutant("the last piece of the logits left out", "project", "range(0, len(weight), columns)", "range(0, len(weight) - columns, columns)", ("tests/heads/test_products.py",)),
    Mutant("a GPU makes logits in pieces", "project", "HOST_COLUMNS if tensors.on_host(hidden.device)", "HOST_COLUMNS if True", ("tests/heads/test_products.py",)),
    Mutant("autocast rounds fp64", "operand_dtype", " or logits == torch.float64", ""),
    Mutant("16-bit operands of two kinds", "operand_dtype", "hidden.dtype == weight.dtype else logits", "True else logits"),
    Mutant("a 16-bit gradient has no memory in the budget", "workspace.tiling", " + student.gradient_bytes()", ""),
    Mutant("small chunks on a GPU", "usual_workspace", "return GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS", "return GPU_WORKSPACE_BYTES, MIN_TOKENS"),
    Mutant("a GPU upcasts what it multiplies", "HiddenSide.take", "self.hidden[rows].to(self.gradient_dtype)", "self.hidden[rows].to(self.dtype)"),
    Mutant("recompute forgets the weights", "solve_again", "weights * factor.reshape(-1), None", "(weights != 0) * factor.reshape(-1), None"),
    Mutant("retained gradients are scaled in place", "backward_chunked", "last = not torch._C._autograd._get_current_graph_task_keep_graph()", "last = True"),
    Mutant("loss without weights", "solve", "times_or_zero(call.weights, seen.loss)", "times_or_zero((call.weights != 0).to(seen.loss.dtype), seen.loss)"),
    Mutant("double backward is silent", "EntropyAwareKL.backward", "if torch.is_grad_enabled():\n            gradients", "if False:\n            gradients"),
    Mutant("outputs keep masked tokens", "per_token", "figure.masked_fill(masked, 0.0)", "figure"),
    Mutant("last token of a batch is not visited", "chunks", "start, stop = 0, len(self.weights)", "start, stop = 0, len(self.weights) - 1"),
    Mutant("slices are not merged", "see", "RowStatistics(self.packed).merge(part).packed", "part.packed"),
    Mutant("chunks ignore the budget", "workspace.tiling", "tokens = max(logits // vocab_size, min_tokens)", "tokens = n"),
    Mutant("teacher's transform for both", "transforms", "*transform(self.student.head, of_student)", "*transform(teacher.head, of_student)"),
    Mutant("dX of compacted tokens is lost", "HiddenGradient.put", "self.hidden[rows] = chunk", "pass"),
    Mutant("bias takes the last chunk", "HiddenGradient.add", "self.bias[columns] += gradient", "self.bias[columns] = gradient"),
    Mutant("tail of the vocabulary is not zeroed", "LogitsGradient.__init__", "self.gradient[..., side.local_vocab_size :].zero_()", "pass"),
    Mutant("in place without telling autograd", "LogitsGradient.__init__", "torch.autograd.graph.increment_version(logits)", "pass"),
    Mutant("in place is forgotten", "LogitsGradient.__init__", "if inplace:", "if False:"),
    Mutant("runs of rows ignore the strides", "uniform_rows", "rows > 1 and stride != rows * row_stride", "False"),
    Mutant("head's bias forgotten", "LMHead.logits", "if self.bias is not None:\n            out", "if False:\n            out"),
    Mutant("dX takes the last panel", "grad_hidden", "products.add_mm(grad_logits[:, part]", "products.mm(grad_logits[:, part]"),
    Mutant("dW takes the last chunk", "grad_weight", "products.add_mm(grad_logits.t()", "products.mm(grad_logits.t()"),
    Mutant("torch: slope of the transform forgotten", "gradient_in_tiles", "gradient * transform_slope(z_s, block.transforms[:3])", "gradient"),
    Mutant("torch: slope of the softcap", "formulas.transform_slope", "(temperature / softcap)) ** 2", "(temperature / softcap))"),
    Mutant("torch: off by one column", "gradient_in_tiles", "block.out[rows, columns] = gradient", "block.out[rows, columns] = gradient.roll(1, 1)"),
    Mutant("torch: unused rows are not zeroed", "gradient_in_tiles", "torch.where(unused(k), 0.0, gradient)", "gradient"),
    Mutant("torch: sign of the teacher's term", "formulas.column_gradient", "log_ratio)) - times_or_zero(c, q)", "log_ratio)) + times_or_zero(c, q)"),
    Mutant("mixture: shares mixed up", "mixture.mixture_terms", "own / mixture, other / mixture", "other / mixture, own / mixture"),
    Mutant("mixture: sign of the forward half's log-ratio", "MixtureStatistics.of", "mixture_terms(-log_ratio, skews.forward)", "mixture_terms(log_ratio, skews.forward)"),
    Mutant("mixture: the smaller mass is the larger", "mixture.mixture_terms", "torch.where(x > 0, 1.0, smaller)", "torch.where(x < 0, 1.0, smaller)"),
    Mutant("mixture: no skew is not looked at", "mixture.mixture_terms", "if skew == 0:", "if False:"),
    Mutant("mixture: columns without mass are not guarded", "MixtureStatistics.of", "times_or_zero(p, reverse.log_over_mixture)", "p * reverse.log_over_mixture"),
    Mutant("torch: the mixture's gradient forgets the share", "formulas.mixture_column_gradient", "reverse.log_over_mixture - reverse.own_share", "reverse.log_over_mixture"),
    Mutant("torch: slices of the mixture are not added", "torch.row_mixture", "mixture[rows] += MixtureStatistics", "mixture[rows] = MixtureStatistics"),
    Mutant("Triton: merge drops the rescaling of Z", "row_math.recentre", "c_s * row.student_sum,", "row.student_sum,"),
    Mutant("Triton: merge drops the shift of P", "row_math.recentre", "row.teacher_cross + row.teacher_sum * (d_t - d_s)", "row.teacher_cross"),
    Mutant("Triton: empty lanes are not guarded", "row_math.distance", 'tl.where(part_max == float("-inf"), 0.0, part_max - maximum)', "part_max - maximum"),
    Mutant("Triton: columns without mass are not guarded", "row_math.times_or_zero", "mass * tl.where(mass == 0, 0.0, value)", "mass * value"),
    Mutant("Triton: sign of Q", "add_columns", "row.student_cross + per_lane(", "row.student_cross - per_lane("),
    Mutant("Triton: gate inverted", "row_math.open_gate", "teacher_entropy > threshold", "teacher_entropy < threshold"),
    Mutant("Triton: weight forgotten in c", "row_math.gated_coefficients", "weight * c_r, weight * c_f", "weight * c_r, c_f"),
    Mutant("Triton: tanh loses its digits near 0", "tanh", "tl.where(size < TANH_BEND, small, large)", "large"),
    Mutant("Triton: slope of the softcap forgotten", "gradient_of_tile", "gradient * transform_slope(z_s, sides.student_inner, sides.student_outer)", "gradient"),
    Mutant("Triton: the ragged end is masked before the transform", "load_tile", 'tl.where(inside, transformed(x, inner, outer, SOFTCAP), float("-inf"))', 'transformed(tl.where(inside, x, float("-inf")), inner, outer, SOFTCAP)'),
    Mutant("Triton: one column too many", "load_tile", "inside = columns < end", "inside = columns <= end"),
    Mutant("Triton: writes beside its row", "gradient_of_tile", "mask=columns < end)", "mask=columns < end + 1)"),
    Mutant("Triton: parts overlap", "numbers.stretch", "tl.minimum(part * columns + columns, vocab_size)", "vocab_size"),
    Mutant("Triton: rows of weight 0 are read", "row_loss_and_gradient_kernel", "tl.where(weight == 0, 0, vocab_size)", "vocab_size"),
    Mutant("Triton: mixture without the other's weight", "row_math.mixture_terms", "other = (1 - skew) * other_mass", "other = other_mass"),
    Mutant("Triton: mixture overflows without a skew", "row_math.mixture_terms", "if PLAIN:", "if False:"),
    Mutant("Triton: mixture's columns without mass are not guarded", "add_mixture_columns", "times_or_zero(column.exp_dt, forward.log_over_mixture)", "column.exp_dt * forward.log_over_mixture"),
    Mutant("Triton: mixture's gradient forgets the share", "row_math.mixture_column_gradient", "reverse.log_over_mixture - reverse.own_share", "reverse.log_over_mixture"),
    Mutant("Triton: the mixture's unused teacher term", "row_math.mixture_column_gradient", "times_or_zero(column.exp_dt, forward.other_share)", "column.exp_dt"),
    Mutant("Triton: skews exchanged", "row_mixture_kernel", "number(forward_skew, dtype), number(reverse_skew, dtype)", "number(reverse_skew, dtype), number(forward_skew, dtype)"),
    Mutant("Triton: the mixture's ragged end is not summed", "row_mixture_kernel", "range(0, tl.cdiv(tl.maximum(end - begin, 0), tile))", "range(0, whole)"),
    Mutant("Triton: the mixture's shares over the other sum", "row_mixture_kernel", "tl.sum(lanes.forward_share, 0) / numbers.teacher_sum", "tl.sum(lanes.forward_share, 0) / numbers.student_sum"),
    Mutant("C++: merge drops the rescaling of Z", ROW_MATH, "row.student_sum *= c_s;", ""),
    Mutant("C++: merge drops the shift of P", ROW_MATH, "row.teacher_cross + times_or_zero(row.teacher_sum, d_t - d_s)", "row.teacher_cross"),
    Mutant("C++: merge forgets Q", ROW_MATH, "sums.student_cross += part.student_cross;", ""),
    Mutant("C++: sign of P", ROW_MATH, "} else {\n    sums.teacher_self += exp_dt * dt;\n    sums.teacher_cross -=", "} else {\n    sums.teacher_self += exp_dt * dt;\n    sums.teacher_cross +="),
    Mutant("C++: guarded loop is not guarded", ROW_MATH, "times_or_zero(exp_ds, log_ratio)", "exp_ds * log_ratio"),
    Mutant("C++: gradient of massless columns", ROW_MATH, "gradient = exp_ds == Value{} ? Value{} : gradient;", ""),
    Mutant("C++: sign of c", ROW_MATH, "gradient -= k.other * exp_dt", "gradient += k.other * exp_dt"),
    Mutant("C++: a without the log-ratio's constant", ROW_MATH, "k.a - shift, k.b", "k.a, k.b"),
    Mutant("C++: weight forgotten in b", ROW_MATH, "weight * c_r, weight * c_f}", "c_r, weight * c_f}"),
    Mutant("C++: slope of the transform forgotten", ROW_MATH, "self / row.student_sum * slope,", "self / row.student_sum,"),
    Mutant("C++: mixture: weights do not add up to 1", ROW_MATH, "return {own, 1 - own};", "return {own, Real(0.9999999) - own};"),
    Mutant("C++: mixture: no skew is not looked at", ROW_MATH, "if (skew.own == 0) return {x, zero, one};", ""),
    Mutant("C++: mixture: shares mixed up", ROW_MATH, "arithmetic.quotient(own, mixture)", "arithmetic.quotient(other, mixture)"),
    Mutant("C++: mixture: columns without mass", ROW_MATH, "times_or_zero(column.exp_dt, forward.log_over_mixture)", "column.exp_dt * forward.log_over_mixture"),
    Mutant("C++: mixture: sums over the other side's", ROW_MATH, "sums.forward_kl / row.teacher_sum", "sums.forward_kl / row.student_sum"),
    Mutant("C++: mixture: gradient forgets the share", ROW_MATH, "reverse.log_over_mixture - reverse.own_share", "reverse.log_over_mixture"),
    Mutant("C++: mixture: gradient of massless columns", ROW_MATH, "times_or_zero(column.exp_ds, factor)", "column.exp_ds * factor"),
    Mutant("C++: mixture: log-ratio without the normalisers", ROW_MATH, "(ds - dt) - row.log_sum_ratio", "ds - dt"),
    Mutant("C++: mixture: skews exchanged", ROW_MATH, "skew_of(Real(own[0])), skew_of(Real(own[1]))", "skew_of(Real(own[1])), skew_of(Real(own[0]))"),
    Mutant("C++: mixture: ragged end is not summed", MIXED_BLOCK, "total<Real>(wide.forward_kl, narrow.forward_kl)", "sum_of_lanes(wide.forward_kl)"),
    Mutant("C++: mixture: unused terms are computed", KERNELS, "mixture_gradient_block(mixed, column_k, k.b != 0,", "mixture_gradient_block(mixed, column_k, true,"),
    Mutant("C++: logarithm: last coefficient", VECTOR, "e * f + 0x1.555554p-2f", "e * f + 0x1.555p-2f"),
    Mutant("C++: ragged end is not summed", BLOCK, "for (; v < count; ++v) add(sums.narrow, Real{}, v);", ""),
    Mutant("C++: a lane adds a whole block", BLOCK, "int run_length = 32", "int run_length = 2048"),
    Mutant("C++: suspicious blocks are not repeated", BLOCK, "if (!(trace - trace == 0))", "if (false)"),
    Mutant("C++: kept exponentials are not recentred", BLOCK, "k.self *= student_factor;", ""),
    Mutant("C++: bf16 is cut, not rounded", CONVERT, "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    Mutant("C++: gate inverted", KERNELS, "open_gate(of_row, gate_threshold)", "1 - open_gate(of_row, gate_threshold)"),
    Mutant("C++: rows of weight 0 are read", KERNELS, "if (weight != 0) {", "{"),
    Mutant("C++: the teacher is transformed as the student", KERNELS, "load_block(problem.teacher, problem.teacher_transform,", "load_block(problem.teacher, problem.student_transform,"),
    Mutant("C++: the last row is forgotten", KERNELS, "row < rows; ++row", "row < rows - 1; ++row"),
    Mutant("CUDA: gate inverted", CUDA_NUMBERS, "return open_gate(row, threshold);", "return 1 - open_gate(row, threshold);"),
    Mutant("CUDA: rows of weight 0 are read", CUDA_KERNELS, "if (weight != 0) {", "{"),
    Mutant("CUDA: rows without a gradient are read", CUDA_VISITS, "if (row.zero) return slice.write_zeros();", ""),
    Mutant("CUDA: head and tail are not summed", CUDA_VISITS, "  slice.visit_edges(add);\n", ""),
    Mutant("CUDA: head and tail have no gradient", CUDA_VISITS, "slice.block.out.dtype, gradient[0]);", "slice.block.out.dtype, 0 * gradient[0]);"),
    Mutant("CUDA: the tail begins late", CUDA_ROW, "const int column = edge < head ? edge : edge + all_groups * columns;", "const int column = edge < head ? edge : edge + all_groups * columns + 1;"),
    Mutant("CUDA: parts overlap", CUDA_ROW, "first + most < all_groups ? most : all_groups - first", "all_groups - first"),
    Mutant("CUDA: rows are skipped", CUDA_KERNELS, "row += hardware::clusters()) {\n      const Slice", "row += hardware::clusters() + 1) {\n      const Slice"),
    Mutant("CUDA: alignment is taken for granted", CUDA_ROW, "% width == 0", "% width < 16"),
    Mutant("CUDA: groups are loaded column by column", CUDA_CHIP, "if (Slice<Sides>::in_groups && aligned)", "if (Slice<Sides>::in_groups && aligned && !aligned)"),
    Mutant("CUDA: copies are not waited for", CUDA_CHIP, "hardware::wait_for_copies<groups_ahead>();", ""),
    Mutant("CUDA: the ring is too short", CUDA_CHIP, "ring_groups = groups_ahead + 1", "ring_groups = groups_ahead"),
    Mutant("CUDA: registers do not turn", CUDA_CHIP, "turn();  // the chunk", "// the chunk"),
    Mutant("CUDA: the last groups are not kept", CUDA_CHIP, "if (first >= most) return;", "if (first >= most - chunk) return;"),
    Mutant("CUDA: a kept row is loaded again", CUDA_CHIP, "if constexpr (kept == Kept::nothing) {\n      visit", "if constexpr (kept != Kept::registers) {\n      visit"),
    Mutant("CUDA: a partial row has one place", CUDA_MERGE, "turn_ = 1 - turn_;", ""),
    Mutant("CUDA: a warp is left out", CUDA_MERGE, "/ hardware::warp_size) part =", "/ hardware::warp_size - 1) part ="),
    Mutant("CUDA: a CTA is left out", CUDA_MERGE, "lane < hardware::cluster_size())", "lane < hardware::cluster_size() - 1)"),
    Mutant("CUDA: nobody waits before leaving", CUDA_MERGE, "void leave() { hardware::cluster_barrier(); }", "void leave() {}"),
    Mutant("CUDA: no guards", CUDA_COLUMNS, "if (!(trace - trace == 0))", "if (trace != trace && false)"),
    Mutant("CUDA: a maximum of -inf is subtracted", CUDA_COLUMNS, "= finite_centre(student_max), teacher_centre = finite_centre(teacher_max);", "= student_max, teacher_centre = teacher_max;"),
    Mutant("CUDA: an infinite log-ratio is used unasked", CUDA_COLUMNS, "row.has_ratio ?", "true ?"),
    Mutant("CUDA: slope of the softcap forgotten", CUDA_COLUMNS, "if (slope.softcap) {", "if (false) {"),
    Mutant("CUDA: mixture: not divided by the sums", CUDA_MIXTURE_KERNELS, "normalised(sums, numbers)", "sums"),
    Mutant("CUDA: mixture: nobody waits before leaving", CUDA_MIXTURE_KERNELS, "  merge.leave();\n", ""),
    Mutant("CUDA: mixture: an infinite log-ratio is used unasked", CUDA_MIXTURE, "row.has_reverse ?", "true ?"),
    Mutant("CUDA: mixture: slope of the transform forgotten", CUDA_MIXTURE, "slope.of_row()", "1 + 0 * slope.of_row()"),
    Mutant("CUDA: bf16 pairs swapped", CUDA_STORAGE, "x[v] = hardware::float_of_bits(pair << 16);", "x[v] = hardware::float_of_bits(pair & 0xffff0000u);"),
    Mutant("CUDA: fp16 read as bf16", CUDA_STORAGE, "return dtype == DType::bfloat16 ? hardware::float_of_bits(stored << 16)", "return dtype != DType::float32 ? hardware::float_of_bits(stored << 16)"),
    Mutant("CUDA: the teacher is transformed as the student", CUDA_LAUNCH, "factors_of(task.teacher_transform)", "factors_of(student)"),
    Mutant("CUDA: temperature forgotten beside a softcap", CUDA_LAUNCH, "Real(transform.softcap / transform.temperature)", "Real(transform.softcap)"),
    Mutant("CUDA: one cluster at a time will do", "resident", "if plan.per_multiprocessor(row, device) >= 2)", "if plan.per_multiprocessor(row, device) >= 1)"),
    Mutant("CUDA: the teacher takes no shared memory", "shared_bytes", "(row.teacher_bytes if self.kept == SHARED else 0)", "0"),
    Mutant("CUDA: clusters before sm_90", "resident", "device.capability < (9, 0) or ", ""),
    Mutant("CUDA: fp64 is kept", "resident", " or max(row.student_bytes, row.teacher_bytes) > 4", ""),
    Mutant("CUDA: few rows are not split", "streaming", "        cluster *= 2\n", "        break\n"),
    Mutant("CUDA: the default stream", "place_of", "torch.cuda.current_stream(tensor.device).cuda_stream", "0"),
    Mutant("auto takes CUDA for rows it would read twice", "automatic", " and cuda.reads_once(device, *logits)", ""),
]  # fmt: skip
