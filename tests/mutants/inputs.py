"""What is broken of how inputs are read: layouts, dtypes, NaN, counts, derivatives that there are not."""

from __future__ import annotations

from .mutant import Mutant, noticed_by

ROW_MATH = "csrc/row_math.h"

LAYOUTS = [
    Mutant(
        "inputs: per-token tensors keep their strides",
        "rows_of",
        ".reshape(-1, *inner).contiguous()",
        ".reshape(-1, *inner)",
    ),
    Mutant("inputs: the stride of one element counts", "uniform_rows", "        if size != 1:", "        if True:"),
]
READ = [
    Mutant(
        "inputs: unsigned labels may be negative",
        "token_weights",
        "if labels is not None and ignore_index >= torch.iinfo(labels.dtype).min:",
        "if labels is not None:",
    ),
    Mutant("inputs: labels wrap", "token_weights", "labels.long() == ignore_index", "labels == ignore_index"),
    Mutant(
        "inputs: any number is a count",
        "check_count",
        "if not 0 <= count.item() < math.inf:",
        "if count.item() != count.item():",
    ),
    Mutant("inputs: rows may overlap in place", "check_inplace", "or tensors.overlaps_itself(student)", "or False"),
    Mutant(
        "inputs: the teacher may be overwritten",
        "EntropyAwareKL.of",
        "        if call.options.inplace:\n",
        "        if False:\n",
    ),
    Mutant(
        "inputs: halves of one tensor are refused",
        "share_memory",
        "return first_of_a < end_of_b and first_of_b < end_of_a",
        "return True",
    ),
    Mutant(
        "inputs: only overlaps from behind are seen",
        "share_memory",
        "first_of_a < end_of_b and first_of_b < end_of_a",
        "first_of_a < end_of_b < end_of_a",
    ),
]
NOT_FINITE = [
    Mutant(
        "inputs: a NaN shuts its gate",
        "exceeds",
        "torch.where(entropy.isnan(), entropy, (",
        "torch.where(entropy.isnan(), 0.0, (",
    ),
    Mutant("inputs: always asks the row", "formulas.open_gate", "if math.isinf(threshold):", "if False:"),
    Mutant(
        "inputs: a NaN that was served is missing",
        "present_entries",
        "log_probs != -torch.inf",
        "log_probs > -torch.inf",
    ),
    Mutant(
        "inputs: a NaN is not among the top k",
        "FirstVisit.terms",
        "else log_p) != -torch.inf",
        "else log_p) > -torch.inf",
    ),
    Mutant(
        "inputs: a NaN advantage has no gradient",
        "sampled",
        "torch.where(free < bound, 0.0, -free)",
        "torch.where(free >= bound, -free, 0.0)",
    ),
    Mutant(
        "inputs: probabilities above 1 are taken",
        "check_log_probs",
        "(log_probs > ROUNDED_LOG_PROB).any()",
        "(log_probs > 9).any()",
    ),
    Mutant(
        "inputs: rounded probabilities are refused",
        "check_log_probs",
        "(log_probs > ROUNDED_LOG_PROB).any()",
        "(log_probs > 0).any()",
    ),
    Mutant("C++: a NaN shuts its gate", ROW_MATH, "? Real(0) : entropy;", "? Real(0) : Real(0);"),
    Mutant(
        "C++: always asks the row", ROW_MATH, "entropy > threshold || threshold == -infinity", "entropy > threshold"
    ),
    Mutant(
        "Triton: a NaN shuts its gate",
        "row_math.open_gate",
        "tl.where(opened, 1.0, teacher_entropy)",
        "tl.where(opened, 1.0, 0.0)",
    ),
    Mutant(
        "Triton: always asks the row",
        "row_math.open_gate",
        '(teacher_entropy > threshold) | (threshold == float("-inf"))',
        "teacher_entropy > threshold",
    ),
]
WEIGHTLESS = [
    Mutant(
        "torch: rows of weight 0 open their gate",
        "torch.row_loss_and_gradient",
        "torch.where(weights == 0, 0.0, open_gate(numbers, gate_threshold))",
        "open_gate(numbers, gate_threshold)",
    ),
    Mutant("Triton: rows of weight 0 open their gate", "row_math.open_gate", " | (weight == 0)", ""),
]
DERIVATIVES = [
    Mutant(
        "inputs: the refusal leads nowhere",
        "refuse_second_derivative",
        "FirstDerivative.apply(upstream, anchor,",
        "FirstDerivative.apply(upstream.detach(), anchor.detach().requires_grad_(),",
    ),
    Mutant(
        "inputs: the refusal does not lead to upstream",
        "refuse_second_derivative",
        "FirstDerivative.apply(upstream, anchor,",
        "FirstDerivative.apply(upstream.detach(), anchor,",
    ),
    Mutant(
        "inputs: many gradients at once",
        "EntropyAwareKL.backward",
        "if torch._C._functorch.is_legacy_batchedtensor(upstream[0]):",
        "if False:",
    ),
]
FP16 = [
    Mutant(
        "fp16: rows do not wait for their weights",
        "solve",
        "        if problem.student.gradient_dtype == torch.float16:\n",
        "        if False:\n",
    ),
    Mutant(
        "fp16: rows wait in their weights",
        "within_fp16",
        "(factors != 0).to(factors.dtype) * FP16_WEIGHT, factors / FP16_WEIGHT",
        "factors, torch.ones_like(factors)",
    ),
    Mutant("fp16: small entries underflow", "FP16_WEIGHT", "FP16_WEIGHT = 16.0", "FP16_WEIGHT = 2.0**-4"),
]
SHARES = [
    Mutant(
        "gates first: every open row is put aside",
        "worth_a_chunk",
        "return alive > 0 and again >= ",
        "return False and again >= ",
    ),
    Mutant(
        "gates first: no row is put aside",
        "worth_a_chunk",
        "return alive > 0 and again >= ",
        "return alive > 0 or again >= ",
    ),
    Mutant(
        "gates first: rows stay where they were",
        "gates_first_forward",
        "moved_up(teacher, alive)",
        "teacher[: len(alive)]",
    ),
    Mutant("gates first: those put aside are forgotten", "gates_first_forward", "put_aside.append(there)", "pass"),
]
TRACED = [
    Mutant(
        "compiled: the backend is asked for while tracing",
        "checked_here",
        'if given["backend"] != "auto" and not torch.compiler.is_compiling():',
        'if given["backend"] != "auto":',
    ),
    Mutant("compiled: counts are not looked at", "compiled.loss", "check_count(call.denominator)", "pass"),
    Mutant(
        "fake: numbers of fake tensors are read",
        "has_numbers",
        "return not tensor.is_meta and (fake is None or not isinstance(tensor, fake.FakeTensor))",
        "return True",
    ),
]
MUTANTS = [
    *noticed_by(("tests/schedules/test_schedules.py", "tests/inputs/test_layouts.py"), LAYOUTS),
    *noticed_by(("tests/inputs/test_check.py",), READ),
    *noticed_by(("tests/test_infinities.py",), NOT_FINITE),
    *WEIGHTLESS,
    *noticed_by(("tests/test_second_derivatives.py",), DERIVATIVES),
    *noticed_by(("tests/schedules/test_fp16.py",), FP16),
    *noticed_by(("tests/schedules/test_objective_costs.py",), SHARES),
    *noticed_by(("tests/test_compile_options.py",), TRACED),
]  # fmt: skip
