# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the sampled token: its log-probabilities, its alignment, its advantage; and of figures to log."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant("tokens: read from where the gradient is", "chunk_gradient", "statistics.with_token(*token)", "statistics.with_token(*token_logits(problem, block, chunk.rows))"),
    Mutant("tokens: transforms of the other side", "token_logits", "of_student, of_teacher = problem.transforms[:3], problem.transforms[3:]", "of_teacher, of_student = problem.transforms[:3], problem.transforms[3:]"),
    Mutant("tokens: every chunk reads the first one's", "token_logits", "problem.tokens.token_ids[rows]", "problem.tokens.token_ids[: len(block.student)]"),
    Mutant("tokens: sides exchanged", "with_token", "[self.student_log_probs(student).clamp(max=0), of_teacher]", "[of_teacher, self.student_log_probs(student).clamp(max=0)]"),
    Mutant("tokens: gates see masked ones", "unknown_where", "None if token is None else token.masked_fill(rows, torch.nan)", "token"),
    Mutant("tokens: a gate is told of the other side", "teacher_token_log_prob", 'self._token_log_prob("teacher", 1)', 'self._token_log_prob("teacher", 0)'),
    Mutant("tokens: a missing entry is found", "log_prob_of", "present & (ids == token_ids.unsqueeze(1))", "ids == token_ids.unsqueeze(1)"),
    Mutant("tokens: what is no entry has probability 1", "log_prob_of", ".sum(1), torch.nan)", ".sum(1), 0.0)"),
    Mutant("tokens: a served teacher's entries are not asked", "tokens_of", "if token_log_probs is None and token_ids is not None:", "if False:"),
    Mutant("tokens: masked ones keep theirs", "EntropyAwareKLOutput.student_log_probs", "self._figure(token[:, 0])", "token[:, 0].view(self._leading)"),
    Mutant("tokens: shut ones forget the teacher", "completed", "token = torch.where(shut, statistics.token_log_probs, token)", "pass"),
    Mutant("tokens: shut ones of a chunk forget the teacher", "find_gates", "statistics = without_student(of_teacher(problem, teacher), token)", "statistics = without_student(of_teacher(problem, teacher), None)"),
    Mutant("tokens: a student that was not seen has a log-probability", "without_student", "statistics.with_token(token, token)", "RowStatistics(packed, statistics.teacher_log_probs(token.expand(-1, 2)))"),
    Mutant("tokens: the teacher that goes first sees its last slice", "teacher_statistics", "problem.transforms[3:], z)", "problem.transforms[3:], torch.full_like(z, -torch.inf))"),
]  # fmt: skip

# What only ranks, or a graph, notice.
AMONG_RANKS = [
    Mutant("tokens: the teacher that goes first has its own", "teacher_statistics", "            problem.shard.maximum(of_visited).wait()\n", ""),
    Mutant("tokens: the teacher that goes first begins at entry 0", "teacher_statistics", "problem.offset + columns.start", "columns.start"),
]  # fmt: skip
IN_A_GRAPH = [
    Mutant("tokens: the fake has none", "loss_fake", "([] if arguments.token_ids is None else [new(n, 2)])", "[]"),
    Mutant("tokens: backward takes them for what was kept", "setup_context", "rest[seen_tensors(arguments.token_ids) - 1 :]", "rest[4:]"),
]  # fmt: skip

MEANS = [
    Mutant("means: masked tokens count", "sums", "self.valid.reshape(1, -1) & ~figures.isnan()", "~figures.isnan()"),
    Mutant("means: what is unknown poisons the rest", "sums", "self.valid.reshape(1, -1) & ~figures.isnan()", "self.valid.reshape(1, -1).expand_as(figures)"),
    Mutant("means: masked and valid exchanged", "EntropyAwareKLOutput.valid", "self._valid.view", "self._valid.logical_not().view"),
    Mutant("means: sums of fp32", "sums", "figures.to(widest_dtype(figures.device))", "figures.float()"),
    Mutant("means: counts before sums", "means_of", "total, count = sums", "count, total = sums"),
]  # fmt: skip

ALIGNED = [
    Mutant("aligned: one to the right", "one_to_the_left", "tensor.roll(-1, -1)", "tensor.roll(1, -1)"),
    Mutant("aligned: the last position predicts the first token", "one_to_the_left", "    left[..., -1:] = fill\n", ""),
    Mutant("aligned: the last position counts", "shifted", 'if moved and "labels" not in moved', 'if False and "labels" not in moved'),
    Mutant("aligned: narrow labels", "shifted", "tensor.long(), ignore_index", "tensor, ignore_index"),
    Mutant("aligned: a negative mask goes on", "check_weights", "(weights >= 0) & (weights < math.inf)", "weights < math.inf"),
    Mutant("aligned: an infinite mask goes on", "check_weights", "(weights >= 0) & (weights < math.inf)", "weights >= 0"),
    Mutant("aligned: a device is asked for its mask", "check_weights", "tensors.readable(weights) and not", "not"),
    Mutant("aligned: positive old log-probabilities go on", "tokens_of", 'if (old_log_probs := tokens["old_log_probs"]) is not None:', "if (old_log_probs := None) is not None:"),
    Mutant("aligned: a graph takes any mask", "compiled.loss", "    check_weights(call.weights)\n", ""),
    Mutant("aligned: a graph takes positive old log-probabilities", "compiled.loss", '        "old_log_probs": tokens.old_log_probs,\n', ""),
]  # fmt: skip

ADVANTAGES = [
    Mutant("advantages: the teacher's are taken", "sampled", "    if advantage is None:\n", "    if True:\n"),
    Mutant("advantages: the dual clip is one of positive ones", "sampled", "beyond = (advantage < 0)", "beyond = (advantage > 0)"),
    Mutant("advantages: the dual clip is of every value", "sampled", "(advantage < 0) & (value > most)", "value > most"),
    Mutant("advantages: the dual clip is forgotten", "sampled", "torch.where(beyond, most, value), torch", "value, torch"),
    Mutant("advantages: what the dual clip cuts has a gradient", "sampled", "torch.where(beyond, 0.0, pull)", "pull"),
    Mutant("advantages: no teacher is one of probability 1", "checked_here", "unknown = torch.full_like(weights, torch.nan)", "unknown = torch.zeros_like(weights)"),
    Mutant("advantages: no teacher, and a gate on it", "check_no_teacher", 'getattr(objective.gate, "of", "student") == "teacher"', "False"),
    Mutant("advantages: no teacher, and no advantages", "check_no_teacher", 'if given["advantages"] is None:', "if False:"),
    Mutant("advantages: dropped where no half takes them", "tokens_of", 'elif given["advantages"] is not None:', "elif False:"),
    Mutant("advantages: a served teacher must know the token", "check_sparse_teacher", "teacher.token_log_probs is None and advantages is None", "teacher.token_log_probs is None"),
]  # fmt: skip
