# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the objectives beyond the default."""

from __future__ import annotations

from .mutant import Mutant

OBJECTIVE, GATES, TERMS = "eopd_kernels/objective.py", "eopd_kernels/gates.py", "eopd_kernels/terms.py"
FIGURES, COLUMNS, TOP_K = "eopd_kernels/figures.py", "eopd_kernels/columns.py", "eopd_kernels/top_k.py"
FUNCTION, SCHEDULES, PROBLEM = "eopd_kernels/function.py", "eopd_kernels/schedules.py", "eopd_kernels/problem.py"
SPARSE, TOKEN_INPUTS, INPUTS = (
    "eopd_kernels/sparse_teacher.py",
    "eopd_kernels/token_inputs.py",
    "eopd_kernels/inputs.py",
)

MUTANTS = [
    Mutant("objectives: blend forgets alpha", OBJECTIVE, '"blend": -self.alpha * rho', '"blend": -rho'),
    Mutant("objectives: T squared is T", OBJECTIVE, "self.temperatures[0] ** 2", "self.temperatures[0]"),
    Mutant("objectives: weight of the reverse half forgotten", OBJECTIVE, "self.reverse_weight * self.loss_factor", "self.loss_factor"),
    Mutant("objectives: the halves' skews exchanged", OBJECTIVE, "return forward, reverse\n", "return reverse, forward\n"),
    Mutant("objectives: JSD mixes the other way round", OBJECTIVE, "reverse=Skewed(1 - beta)", "reverse=Skewed(beta)"),
    Mutant("objectives: a soft gate is taken for a hard one", OBJECTIVE, 'self.gate.of == "teacher" and self.gate.sharpness is None', 'self.gate.of == "teacher"'),
    Mutant("objectives: a student's gate is taken for the teacher's", OBJECTIVE, 'self.gate.of == "teacher" and self.gate.sharpness is None', "self.gate.sharpness is None"),
    Mutant("objectives: entropy of the other side", GATES, 'if of == "teacher" else', 'if of == "student" else'),
    Mutant("objectives: normalised by nothing", GATES, "self.threshold * math.log(vocab_size) if self.normalized", "self.threshold if self.normalized"),
    Mutant("objectives: sharpness per nat throughout", GATES, "self.sharpness / (max(math.log(vocab_size), 1e-9) if self.normalized else 1.0)", "self.sharpness"),
    Mutant("objectives: masked tokens count in a quantile", GATES, "statistics.packed.masked_fill((weights == 0).unsqueeze(1), torch.nan)", "statistics.packed"),
    Mutant("objectives: masked tokens open their gate", GATES, "torch.where(weights == 0, 0.0, opened.detach().to(dtype))", "opened.detach().to(dtype)"),
    Mutant("objectives: a quantile is taken chunk by chunk", GATES, "return not isinstance(gate, str | EntropyGate)", "return False"),
    Mutant("objectives: weights of the reverse half forgotten", TERMS, "c_r * tokens.reverse_weights", "c_r"),
    Mutant("objectives: weights of the forward half forgotten", TERMS, "c_f * tokens.forward_weights", "c_f"),
    Mutant("objectives: advantage of the new policy", TERMS, "advantage = log_q - old_log_probs", "advantage = log_q - log_p"),
    Mutant("objectives: clip bounds exchanged", TERMS, "ratio.clamp(1 - half.clip_low, 1 + half.clip_high)", "ratio.clamp(1 - half.clip_high, 1 + half.clip_low)"),
    Mutant("objectives: the clip is forgotten", TERMS, "Half(torch.maximum(free, bound), pull", "Half(free, pull"),
    Mutant("objectives: a clipped token keeps its gradient", TERMS, "torch.where(free < bound, 0.0, -free)", "-free"),
    Mutant("objectives: the sampled column has p for p - 1", TERMS, "torch.expm1(token.log_p)", "torch.exp(token.log_p)"),
    Mutant("objectives: the teacher is not renormalised", TERMS, "log_q = log_q - total(log_q).unsqueeze(1)", "pass"),
    Mutant("objectives: the student is not renormalised", TERMS, "log_p = log_p - total(log_p).unsqueeze(1)", "log_p = log_p.clone()"),
    Mutant("objectives: a raw teacher's mass is taken for 1", TERMS, "    a = mass\n", "    a = torch.ones_like(mass)\n"),
    Mutant("objectives: the tail has no gradient", TERMS, "(p_tail - q_tail) / p_tail, own", "torch.zeros_like(p_tail), own"),
    Mutant("objectives: the tail's mass is the teacher's", TERMS, "(q_tail - own.sum(1)).clamp_min", "q_tail.clamp_min"),
    Mutant("objectives: rounding makes the tail's divergence negative", TERMS, "(of_top + of_tail).clamp_min(0)", "of_top + of_tail"),
    Mutant("objectives: a column of one half forgets the other", TERMS, "values += torch.where(same.any(2), here, p * a.unsqueeze(1))", "values += here"),
    Mutant("objectives: share of the skewed reverse half forgotten", TERMS, "mixture.reverse_share - mixture.reverse_kl", "-mixture.reverse_kl"),
    Mutant("objectives: share of the skewed forward half forgotten", TERMS, "Half(mixture.forward_kl, mixture.forward_share)", "Half(mixture.forward_kl, torch.ones_like(mixture.forward_kl))"),
    Mutant("objectives: the gradient of an unused half", TERMS, "c = c_f if dense_f else", "c = c_f if True else"),
    Mutant("objectives: columns outside of a slice are written", COLUMNS, "torch.where(self.inside, self.local, column)", "self.local"),
    Mutant("objectives: columns of its own are added to", COLUMNS, "out.scatter_(", "out.scatter_add_("),
    Mutant("objectives: slope of the transform at single columns", COLUMNS, "own.values) * transform_slope(z_s, transforms[:3])", "own.values)"),
    Mutant("objectives: logits outside of a slice are taken", COLUMNS, "torch.where(inside, transformed(block.gather(1, local), transform, into.dtype), into)", "transformed(block.gather(1, local), transform, into.dtype)"),
    Mutant("objectives: the other side's columns", FIGURES, "transformed_at(teacher, local, 0, problem.transforms[3:], into)", "transformed_at(student, local, 0, problem.transforms[3:], into)"),
    Mutant("objectives: a negative scale is forgotten", FIGURES, "teacher if scale > 0 else -teacher", "teacher"),
    Mutant("objectives: top k of shut rows", FIGURES, "opened = gate.nonzero()", "opened = (gate == 0).nonzero()"),
    Mutant("objectives: top k of every row", FIGURES, "gate.nonzero().squeeze(1) if devices.readable(gate) else", "(gate < 9).nonzero().squeeze(1) if devices.readable(gate) else"),
    Mutant("objectives: a GPU is asked for its open rows", FIGURES, "if devices.readable(gate) else slice(None)", "if True else slice(None)"),
    Mutant("objectives: slices keep their own top k", FIGURES, "torch.cat([self.top_teacher, teacher], 1).topk(self.top_ids.shape[1], 1)", "torch.cat([teacher, self.top_teacher], 1).topk(self.top_ids.shape[1], 1)"),
    Mutant("objectives: a served entropy is forgotten", FIGURES, "packed[:, 4] = -tokens.teacher_entropy", "packed[:, 4] = 0.0"),
    Mutant("objectives: a served token is looked up", FIGURES, "if given is None else given.unsqueeze(1)", "if True else given.unsqueeze(1)"),
    Mutant("objectives: the ragged end is left out", TOP_K, "columns = torch.cat([columns, ragged], 1)", "pass"),
    Mutant("objectives: too few groups", TOP_K, "maxima.topk(k, dim=1", "maxima.topk(max(1, k - 1), dim=1"),
    Mutant("objectives: shut rows reach the student", FUNCTION, "opened = torch.where(gate == 0, 0.0, weights)", "opened = weights"),
    Mutant("objectives: a gate that looks at the student is asked first", FUNCTION, "looks_away = gate is not None or not needs_student(objective.gate)", "looks_away = True"),
    Mutant("objectives: shut rows forget the teacher", FUNCTION, "torch.where(shut, packed, seen.packed)", "seen.packed"),
    Mutant("objectives: the gates found first are forgotten", FUNCTION, "tokens = replace(tokens, gate=gate)", "pass"),
    Mutant("objectives: clipped rows reach the products", SCHEDULES, "COMPACT_BELOW = 0.75", "COMPACT_BELOW = -1.0"),
    Mutant("objectives: compacted rows lose their place", SCHEDULES, "alive + rows.start if isinstance(rows, slice) else rows[alive]", "alive if isinstance(rows, slice) else rows[: len(alive)]"),
    Mutant("objectives: the mixture sees one slice", SCHEDULES, "of_chunk.see_mixture(problem, *chunk.logits(columns))", "of_chunk.see_mixture(problem, *chunk.logits(next(iter(problem.slices()))))"),
    Mutant("objectives: a given gate meets the fused kernel", PROBLEM, "given = (tokens.gate, tokens.reverse_weights,", "given = (tokens.reverse_weights,"),
    Mutant("objectives: a repeated entry counts twice", SPARSE, "return present & torch.empty_like(first).scatter_(1, order, first)", "return present"),
    Mutant("objectives: a missing entry shadows its double", SPARSE, "torch.where(present, ids, -1 - torch.arange(ids.shape[1], device=ids.device))", "ids.clone()"),
    Mutant("objectives: valid is forgotten", SPARSE, "present &= valid", "pass"),
    Mutant("objectives: the rest has no entropy", SPARSE, " - weighted(rest, rest.log())", ""),
    Mutant("objectives: masked ids are looked up", TOKEN_INPUTS, "rows_of(token_ids.long()).masked_fill(unused, 0)", "rows_of(token_ids.long())"),
    Mutant("objectives: masked numbers are used", TOKEN_INPUTS, "rows_of(tensor.detach().to(weights.dtype)).masked_fill(unused, 0.0)", "rows_of(tensor.detach().to(weights.dtype))"),
    Mutant("objectives: entries outside the vocabulary", TOKEN_INPUTS, "if low < 0 or high >= vocab_size:", "if low < 0:"),
    Mutant("objectives: a GPU is asked for its ids", TOKEN_INPUTS, "if not devices.readable(ids):", "if False:"),
    Mutant("objectives: a served teacher may require grad", INPUTS, "if isinstance(tensor, Tensor) and not name.startswith(\"student\"):", "if isinstance(tensor, Tensor) and not name.startswith((\"student\", \"teacher.\")):"),
]  # fmt: skip
