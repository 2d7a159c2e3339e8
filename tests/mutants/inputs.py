"""What is broken of how inputs are read: layouts, dtypes, NaN, counts, derivatives that there are not."""

from __future__ import annotations

from .mutant import Mutant, noticed_by

INPUTS, TOKEN_INPUTS, TOKENS = "eopd_kernels/inputs.py", "eopd_kernels/token_inputs.py", "eopd_kernels/tokens.py"
FUNCTION, SIDES, MEMORY = "eopd_kernels/function.py", "eopd_kernels/sides.py", "eopd_kernels/memory.py"
GATES, TERMS, FIGURES = "eopd_kernels/gates.py", "eopd_kernels/terms.py", "eopd_kernels/figures.py"
OBJECTIVE, SPARSE, TORCH = (
    "eopd_kernels/objective.py",
    "eopd_kernels/sparse_teacher.py",
    "eopd_kernels/backends/torch.py",
)
FP16_RULE = "eopd_kernels/fp16.py"
GATES_FIRST, COMPILED, DEVICES = "eopd_kernels/gates_first.py", "eopd_kernels/compiled.py", "eopd_kernels/devices.py"
ROW_MATH, TRITON_MATH = "csrc/row_math.h", "eopd_kernels/backends/triton/row_math.py"

LAYOUTS = [
    Mutant(
        "inputs: per-token tensors keep their strides",
        TOKENS,
        ".reshape(-1, *inner).contiguous()",
        ".reshape(-1, *inner)",
    ),
    Mutant("inputs: the stride of one element counts", SIDES, "        if size != 1:", "        if True:"),
]
READ = [
    Mutant(
        "inputs: unsigned labels may be negative",
        TOKEN_INPUTS,
        "if labels is not None and ignore_index >= torch.iinfo(labels.dtype).min:",
        "if labels is not None:",
    ),
    Mutant("inputs: labels wrap", TOKEN_INPUTS, "labels.long() == ignore_index", "labels == ignore_index"),
    Mutant(
        "inputs: any number is a count",
        TOKEN_INPUTS,
        "if not 0 <= count.item() < math.inf:",
        "if count.item() != count.item():",
    ),
    Mutant("inputs: rows may overlap in place", INPUTS, "or memory.overlaps_itself(student)", "or False"),
    Mutant(
        "inputs: the teacher may be overwritten", FUNCTION, "        if call.options.inplace:\n", "        if False:\n"
    ),
    Mutant(
        "inputs: halves of one tensor are refused",
        MEMORY,
        "return first_of_a < end_of_b and first_of_b < end_of_a",
        "return True",
    ),
    Mutant(
        "inputs: only overlaps from behind are seen",
        MEMORY,
        "first_of_a < end_of_b and first_of_b < end_of_a",
        "first_of_a < end_of_b < end_of_a",
    ),
]
NOT_FINITE = [
    Mutant(
        "inputs: a NaN shuts its gate",
        GATES,
        "torch.where(entropy.isnan(), entropy, (",
        "torch.where(entropy.isnan(), 0.0, (",
    ),
    Mutant("inputs: always asks the row", OBJECTIVE, "if math.isinf(threshold):", "if False:"),
    Mutant("inputs: a NaN that was served is missing", SPARSE, "log_probs != -torch.inf", "log_probs > -torch.inf"),
    Mutant(
        "inputs: a NaN is not among the top k", FIGURES, "log_q != -torch.inf if tokens", "log_q > -torch.inf if tokens"
    ),
    Mutant(
        "inputs: a NaN advantage has no gradient",
        TERMS,
        "torch.where(free < bound, 0.0, -free)",
        "torch.where(free >= bound, -free, 0.0)",
    ),
    Mutant(
        "inputs: probabilities above 1 are taken",
        TOKEN_INPUTS,
        "(log_probs > ROUNDED_LOG_PROB).any()",
        "(log_probs > 9).any()",
    ),
    Mutant(
        "inputs: rounded probabilities are refused",
        TOKEN_INPUTS,
        "(log_probs > ROUNDED_LOG_PROB).any()",
        "(log_probs > 0).any()",
    ),
    Mutant("C++: a NaN shuts its gate", ROW_MATH, "? Real(0) : entropy;", "? Real(0) : Real(0);"),
    Mutant(
        "C++: always asks the row", ROW_MATH, "entropy > threshold || threshold == -infinity", "entropy > threshold"
    ),
    Mutant(
        "Triton: a NaN shuts its gate",
        TRITON_MATH,
        "tl.where(opened, 1.0, teacher_entropy)",
        "tl.where(opened, 1.0, 0.0)",
    ),
    Mutant(
        "Triton: always asks the row",
        TRITON_MATH,
        '(teacher_entropy > gate_threshold) | (gate_threshold == float("-inf"))',
        "teacher_entropy > gate_threshold",
    ),
]
WEIGHTLESS = [
    Mutant(
        "torch: rows of weight 0 open their gate",
        TORCH,
        "torch.where(weights == 0, 0.0, open_gate(statistics, gate_threshold))",
        "open_gate(statistics, gate_threshold)",
    ),
    Mutant("Triton: rows of weight 0 open their gate", TRITON_MATH, " | (weight == 0)", ""),
]
DERIVATIVES = [
    Mutant(
        "inputs: the refusal leads nowhere",
        FUNCTION,
        "FirstDerivative.apply(upstream, anchor,",
        "FirstDerivative.apply(upstream.detach(), anchor.detach().requires_grad_(),",
    ),
    Mutant(
        "inputs: the refusal does not lead to upstream",
        FUNCTION,
        "FirstDerivative.apply(upstream, anchor,",
        "FirstDerivative.apply(upstream.detach(), anchor,",
    ),
    Mutant(
        "inputs: many gradients at once",
        FUNCTION,
        "if torch._C._functorch.is_legacy_batchedtensor(upstream[0]):",
        "if False:",
    ),
]
FP16 = [
    Mutant(
        "fp16: rows do not wait for their weights",
        FUNCTION,
        "        if problem.student.gradient_dtype == torch.float16:\n",
        "        if False:\n",
    ),
    Mutant(
        "fp16: rows wait in their weights",
        FP16_RULE,
        "(factors != 0).to(factors.dtype) * FP16_WEIGHT, factors / FP16_WEIGHT",
        "factors, torch.ones_like(factors)",
    ),
    Mutant("fp16: small entries underflow", FP16_RULE, "FP16_WEIGHT = 16.0", "FP16_WEIGHT = 2.0**-4"),
]
SHARES = [
    Mutant(
        "gates first: every open row is put aside",
        GATES_FIRST,
        "return alive > 0 and again >= ",
        "return False and again >= ",
    ),
    Mutant(
        "gates first: no row is put aside",
        GATES_FIRST,
        "return alive > 0 and again >= ",
        "return alive > 0 or again >= ",
    ),
    Mutant("gates first: rows stay where they were", GATES_FIRST, "moved_up(teacher, alive)", "teacher[: len(alive)]"),
    Mutant("gates first: those put aside are forgotten", GATES_FIRST, "put_aside.append(there)", "pass"),
    Mutant(
        "gates first: gates are asked for again",
        GATES_FIRST,
        'objective=replace(problem.objective, gate="always")',
        "objective=problem.objective",
    ),
]
TRACED = [
    Mutant(
        "compiled: the backend is asked for while tracing",
        INPUTS,
        'if backend != "auto" and not torch.compiler.is_compiling():',
        'if backend != "auto":',
    ),
    Mutant("compiled: counts are not looked at", COMPILED, "check_count(arguments.denominator)", "pass"),
    Mutant(
        "fake: numbers of fake tensors are read",
        DEVICES,
        "return not tensor.is_meta and (fake is None or not isinstance(tensor, fake.FakeTensor))",
        "return True",
    ),
]
MUTANTS = [
    *noticed_by(("tests/test_layouts.py",), LAYOUTS),
    *noticed_by(("tests/test_inputs.py",), READ),
    *noticed_by(("tests/test_infinities.py",), NOT_FINITE),
    *WEIGHTLESS,
    *noticed_by(("tests/test_second_derivatives.py",), DERIVATIVES),
    *noticed_by(("tests/test_fp16.py",), FP16),
    *noticed_by(("tests/test_objective_costs.py",), SHARES),
    *noticed_by(("tests/test_compile_options.py",), TRACED),
]  # fmt: skip
