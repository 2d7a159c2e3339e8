# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the objectives beyond the default."""

from __future__ import annotations

from .mutant import Mutant

OBJECTIVE, GATES, TERMS = (
    "eopd_kernels/objective/objective.py",
    "eopd_kernels/objective/gates.py",
    "eopd_kernels/schedules/loss_terms.py",
)
FIGURES, COLUMNS, TOP_K = (
    "eopd_kernels/schedules/first_visit.py",
    "eopd_kernels/schedules/own_columns.py",
    "eopd_kernels/row_math/top_k.py",
)
FUNCTION, SCHEDULES, PROBLEM = (
    "eopd_kernels/function.py",
    "eopd_kernels/schedules.py",
    "eopd_kernels/schedules/problem.py",
)
SPARSE, TOKEN_INPUTS, INPUTS = (
    "eopd_kernels/inputs/top_k_teacher.py",
    "eopd_kernels/inputs/per_token.py",
    "eopd_kernels/inputs/check.py",
)

MUTANTS = [
    Mutant("objectives: blend forgets alpha", "combination", '"blend": -self.alpha * rho', '"blend": -rho'),
    Mutant("objectives: T squared is T", "loss_factor", "self.temperatures[0] ** 2", "self.temperatures[0]"),
    Mutant("objectives: weight of the reverse half forgotten", "combination", "self.reverse_weight * self.loss_factor", "self.loss_factor"),
    Mutant("objectives: the halves' skews exchanged", "skews", "return forward, reverse\n", "return reverse, forward\n"),
    Mutant("objectives: JSD mixes the other way round", "jsd", "reverse=Skewed(1 - beta)", "reverse=Skewed(beta)"),
    Mutant("objectives: a soft gate is taken for a hard one", "hard_gate", 'self.gate.of == "teacher" and self.gate.sharpness is None', 'self.gate.of == "teacher"'),
    Mutant("objectives: a student's gate is taken for the teacher's", "hard_gate", 'self.gate.of == "teacher" and self.gate.sharpness is None', "self.gate.sharpness is None"),
    Mutant("objectives: entropy of the other side", "entropy", 'if of == "teacher" else', 'if of == "student" else'),
    Mutant("objectives: normalised by nothing", "threshold_in_nats", "self.threshold * math.log(vocab_size) if self.normalized", "self.threshold if self.normalized"),
    Mutant("objectives: sharpness per nat throughout", "EntropyGate.__call__", "self.sharpness / (max(math.log(vocab_size), 1e-9) if self.normalized else 1.0)", "self.sharpness"),
    Mutant("objectives: masked tokens count in a quantile", "gate_values", "statistics.unknown_where(weights == 0)", "statistics"),
    Mutant("objectives: masked tokens open their gate", "gate_values", "torch.where(weights == 0, 0.0, opened.detach().to(dtype))", "opened.detach().to(dtype)"),
    Mutant("objectives: a quantile is taken chunk by chunk", "needs_every_row", "return not isinstance(gate, str | EntropyGate)", "return False"),
    Mutant("objectives: weights of the reverse half forgotten", "terms_of", "c_r * tokens.reverse_weights", "c_r"),
    Mutant("objectives: weights of the forward half forgotten", "terms_of", "c_f * tokens.forward_weights", "c_f"),
    Mutant("objectives: advantage of the new policy", "sampled", "advantage = log_q - old_log_probs", "advantage = log_q - log_p"),
    Mutant("objectives: clip bounds exchanged", "sampled", "ratio.clamp(1 - half.clip_low, 1 + half.clip_high)", "ratio.clamp(1 - half.clip_high, 1 + half.clip_low)"),
    Mutant("objectives: the clip is forgotten", "sampled", "value = torch.maximum(free, bound)", "value = free"),
    Mutant("objectives: a clipped token keeps its gradient", "sampled", "torch.where(free < bound, 0.0, -free)", "-free"),
    Mutant("objectives: the sampled column has p for p - 1", "sampled", "torch.expm1(token.log_p)", "torch.exp(token.log_p)"),
    Mutant("objectives: the teacher is not renormalised", "top_k_half", "log_q = log_q - total(log_q).unsqueeze(1)", "pass"),
    Mutant("objectives: the student is not renormalised", "top_k_half", "log_p = log_p - total(log_p).unsqueeze(1)", "log_p = log_p.clone()"),
    Mutant("objectives: a raw teacher's mass is taken for 1", "top_k_half", "    a = mass\n", "    a = torch.ones_like(mass)\n"),
    Mutant("objectives: the tail has no gradient", "top_k_half", "(p_tail - q_tail) / p_tail, own", "torch.zeros_like(p_tail), own"),
    Mutant("objectives: the tail's mass is the teacher's", "top_k_half", "(q_tail - own.sum(1)).clamp_min", "q_tail.clamp_min"),
    Mutant("objectives: rounding makes the tail's divergence negative", "top_k_half", "(of_top + of_tail).clamp_min(0)", "of_top + of_tail"),
    Mutant("objectives: a column of one half forgets the other", "joined", "values += torch.where(same.any(2), here, p * a.unsqueeze(1))", "values += here"),
    Mutant("objectives: share of the skewed reverse half forgotten", "loss_terms.reverse_half", "mixture.reverse_share - mixture.reverse_kl", "-mixture.reverse_kl"),
    Mutant("objectives: share of the skewed forward half forgotten", "loss_terms.forward_half", "Half(mixture.forward_kl, mixture.forward_share)", "Half(mixture.forward_kl, torch.ones_like(mixture.forward_kl))"),
    Mutant("objectives: the gradient of an unused half", "terms_of", "c = c_f if dense_f else", "c = c_f if True else"),
    Mutant("objectives: columns outside of a slice are written", "write", "torch.where(self.inside, self.local, column)", "self.local"),
    Mutant("objectives: columns of its own are added to", "write", "out.scatter_(", "out.scatter_add_("),
    Mutant("objectives: slope of the transform at single columns", "Patch.of", "own.values) * transform_slope(z_s, transforms[:3])", "own.values)"),
    Mutant("objectives: logits outside of a slice are taken", "transformed_at", "torch.where(inside, transformed(block.gather(1, local), transform, into.dtype), into)", "transformed(block.gather(1, local), transform, into.dtype)"),
    Mutant("objectives: the other side's columns", "likeliest", "transformed_at(block.teacher, local, 0, problem.transforms[3:], into)", "transformed_at(block.student, local, 0, problem.transforms[3:], into)"),
    Mutant("objectives: a negative scale is forgotten", "likeliest", "block.teacher if scale > 0 else -block.teacher", "block.teacher"),
    Mutant("objectives: top k of shut rows", "see_top_k", "opened = gate.nonzero()", "opened = (gate == 0).nonzero()"),
    Mutant("objectives: top k of every row", "see_top_k", "gate.nonzero().squeeze(1) if tensors.readable(gate) else", "(gate < 9).nonzero().squeeze(1) if tensors.readable(gate) else"),
    Mutant("objectives: a GPU is asked for its open rows", "see_top_k", "if tensors.readable(gate) else slice(None)", "if True else slice(None)"),
    Mutant("objectives: slices keep their own top k", "_merge_top", "torch.cat([self.top_teacher, teacher], 1).topk(self.top_ids.shape[1], 1)", "torch.cat([teacher, self.top_teacher], 1).topk(self.top_ids.shape[1], 1)"),
    Mutant("objectives: a served entropy is forgotten", "_of_student", "packed[:, 4] = -tokens.teacher_entropy", "packed[:, 4] = 0.0"),
    Mutant("objectives: a served token is looked up", "known_statistics", "self.token_teacher, tokens.teacher_token_log_probs)", "self.token_teacher)"),
    Mutant("objectives: the ragged end is left out", "top_k", "columns = torch.cat([columns, ragged], 1)", "pass"),
    Mutant("objectives: too few groups", "top_k", "maxima.topk(k, dim=1", "maxima.topk(max(1, k - 1), dim=1"),
    Mutant("objectives: shut rows reach the student", "planned", "problem_of(call, torch.where(gate == 0, 0.0, call.weights))", "everything"),
    Mutant("objectives: a gate that looks at the student is asked first", "teacher_goes_first", "looks_away = call.tokens.gate is not None or not needs_student(objective.gate)", "looks_away = True"),
    Mutant("objectives: shut rows forget the teacher", "completed", "torch.where(shut, statistics.packed, seen.packed)", "seen.packed"),
    Mutant("objectives: the gates found first are forgotten", "of_open_tokens", "tokens=replace(self.tokens, gate=gate)", "tokens=self.tokens"),
    Mutant("objectives: clipped rows reach the products", "COMPACT_BELOW", "COMPACT_BELOW = 0.75", "COMPACT_BELOW = -1.0"),
    Mutant("objectives: compacted rows lose their place", "general_gradient", "alive + rows.start if isinstance(rows, slice) else rows[alive]", "alive if isinstance(rows, slice) else rows[: len(alive)]"),
    Mutant("objectives: the mixture sees one slice", "recompute_forward", "of_chunk.see_mixture(problem, chunk.logits(columns))", "of_chunk.see_mixture(problem, chunk.logits(next(iter(problem.slices()))))"),
    Mutant("objectives: a given gate meets the fused kernel", "fused", "given = (tokens.gate, tokens.reverse_weights,", "given = (tokens.reverse_weights,"),
    Mutant("objectives: a repeated entry counts twice", "present_entries", "return present & torch.empty_like(first).scatter_(1, order, first)", "return present"),
    Mutant("objectives: a missing entry shadows its double", "present_entries", "torch.where(present, ids, -1 - torch.arange(ids.shape[1], device=ids.device))", "ids.clone()"),
    Mutant("objectives: valid is forgotten", "present_entries", "present &= valid", "pass"),
    Mutant("objectives: the rest has no entropy", "entropy_lower_bound", " - times_or_zero(rest, rest.log())", ""),
    Mutant("objectives: masked ids are looked up", "tokens_of", "rows_of(token_ids.long()).masked_fill(unused, 0)", "rows_of(token_ids.long())"),
    Mutant("objectives: masked numbers are used", "tokens_of.numbers", "rows_of(tensor.detach().to(weights.dtype)).masked_fill(unused, 0.0)", "rows_of(tensor.detach().to(weights.dtype))"),
    Mutant("objectives: entries outside the vocabulary", "within_vocabulary", "if low < 0 or high >= vocab_size:", "if low < 0:"),
    Mutant("objectives: a GPU is asked for its ids", "within_vocabulary", "if not tensors.readable(ids):", "if False:"),
    Mutant("objectives: a served teacher may require grad", "check_constants", "if isinstance(tensor, Tensor) and not name.startswith(\"student\"):", "if isinstance(tensor, Tensor) and not name.startswith((\"student\", \"teacher.\")):"),
]  # fmt: skip
