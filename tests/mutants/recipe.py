# ruff: noqa: E501 (a mutant is a line)
"""What is broken of python/: options that do not arrive, completions and log-probabilities that are others', sums that are not."""

from __future__ import annotations

from .mutant import Mutant, of_the_recipe

MUTANTS = [
    *of_the_recipe("answers", [
        Mutant("recipe: the first box counts", "is_right", "extract_boxed_content(text.rpartition(MARK)[2])", r'extract_boxed_content("\\boxed".join(text.rpartition(MARK)[2].split("\\boxed")[:2]))'),
        Mutant("recipe: mathematics reads the first box", "is_right", "parse(completion.rpartition(MARK)[2])", r'parse("\\boxed".join(completion.rpartition(MARK)[2].split("\\boxed")[:2]))'),
        Mutant("recipe: what stands before #### counts", "is_right", "text.rpartition(MARK)[2])", "text.partition(MARK)[0])"),
        Mutant("recipe: --answer-check is forgotten", "Scenario.check", "answer=prompt.answer, check=check", "answer=prompt.answer"),
    ]),
    *of_the_recipe("objectives", [
        Mutant("recipe: --tau does not reach the objective", "objectives.objectives", "gate=EntropyGate(tau), ", ""),
        Mutant("recipe: --alpha does not reach the objective", "objectives.objectives", "alpha=alpha, combine", "combine"),
        Mutant("recipe: --combine does not reach the objective", "objectives.objectives", ", combine=combine)\n        for", ")\n        for"),
        Mutant("recipe: --temperature does not reach the objective", "objectives.objectives", "from_block(name, temperature=temperature)", "from_block(name)"),
        Mutant("recipe: a block's part is its first class", "objectives.part", "if set(value) <= set(known):", "if True:"),
    ]),
    *of_the_recipe("distill_trainer", [
        Mutant("recipe: a micro-batch is its own denominator", "OnPolicyTrainer.compute_loss", "num_items=num_items_in_batch", "num_items=None"),
        Mutant("recipe: the denominator counts completions", "OnPolicyTrainer.get_batch_samples", "batch.completion_mask.sum()", "batch.completion_mask.any(1).sum()"),
        Mutant("recipe: old log-probabilities are those of now", "training.score", "old_log_probs=rollouts.log_probs if sampled else None", "old_log_probs=entropy_aware_kl(student_hidden.detach(), taught, student_head=LMHead.from_model(student), teacher_head=head, token_ids=rollouts.completion_ids).student_log_probs if sampled else None"),
        Mutant("recipe: each step draws completions of its own", "OnPolicyTrainer.get_batch_samples", "if any(draw.number not in self.drawn for draw in draws):", "if True:"),
        Mutant("recipe: a rollout is as long as a step", "OnPolicyTrainer.__init__", "rollout_prompts or args", "args"),
        Mutant("recipe: a rollout's steps learn from the same prompts", "OnPolicyTrainer.until_next_rollout", "self.stream[draw.number + at]", "draw._replace(number=draw.number + at)"),
        Mutant("recipe: the share of clipped tokens forgets the advantage", "clipped_by_ratio", "(advantage > 0) & (ratio > 1 + half.clip_high)", "(ratio > 1 + half.clip_high)"),
        Mutant("recipe: the share of clipped tokens has one bound for both", "clipped_by_ratio", "ratio < 1 - half.clip_low", "ratio < 1 - half.clip_high"),
        Mutant("recipe: the share of clipped tokens forgets the dual clip", "clipped_by_ratio", "half.clip_most or torch.inf", "torch.inf"),
        Mutant("recipe: clipped tokens per completion", "StepTotals.metrics", 'mean(total["clipped_by_ratio"], tokens)', 'mean(total["clipped_by_ratio"], total["sequences"])'),
        Mutant("recipe: the metrics split at another tau", "StepTotals.add_tokens", "seen.teacher_entropy > self.tau", "seen.teacher_entropy > 0.8"),
    ]),
    *of_the_recipe("distill_rollouts", [
        Mutant("recipe: a draw's log-probability is its probability", "DrawTokens.__call__", ".squeeze(-1).log_()", ".squeeze(-1)"),
        Mutant("recipe: the end of a sequence is no part of it", "rollouts.completion_mask", "(ends.cumsum(dim=1) - ends.long()) == 0", "ends.cumsum(dim=1) == 0"),
        Mutant("recipe: top-p cuts nothing", "rollouts.sample", "if top_p < 1 else []", "if False else []"),
        Mutant("recipe: ids that the teacher lacks are drawn", "rollouts.sample", "suppress_tokens=unshared or None", "suppress_tokens=None"),
        Mutant("recipe: one seed for all draws", "SampledAnswers.answers", 'seed_of("tokens", self.seed, draw.number)', 'seed_of("tokens", self.seed, 0)'),
        Mutant("recipe: rounds in one order", "PromptStream._order", 'seed_of("order", self.seed, turn)', 'seed_of("order", self.seed, 0)'),
    ]),
    *of_the_recipe("distill_wiring", [
        Mutant("recipe: --rollout-prompts is forgotten", "distill.train", "rollout_prompts=options.rollouts.rollout_prompts,", "rollout_prompts=None,"),
        Mutant("recipe: the trainer splits at another tau", "distill.train", "tau=options.loss.tau,", "tau=0.8,"),
        Mutant("recipe: --off-policy-fraction is forgotten", "distill.answering", '"off_policy_fraction": rollouts.off_policy_fraction,', ""),
        Mutant("recipe: --seed does not reach the draws", "distill.answering", '"seed": options.training.seed,', '"seed": 0,'),
        Mutant("recipe: --seed does not reach the prompts' order", "distill.train", "args.max_steps * args.prompts_per_step, args.seed)", "args.max_steps * args.prompts_per_step, 0)"),
        Mutant("recipe: --max-new-tokens is the default's", "distill.answering", '"max_new_tokens": rollouts.max_new_tokens,', '"max_new_tokens": 256,'),
        Mutant("recipe: --teacher-dtype is forgotten", "load_scenario", "teacher_name, models.teacher_dtype, device", 'teacher_name, "float32", device'),
        Mutant("recipe: --student-dtype is forgotten", "Scenario.load_student", "models.student_dtype, self", '"float32", self'),
    ]),
    *of_the_recipe("distill_wiring", [
        Mutant("recipe: --eval-top-p is forgotten", "Results.sampled", "run.eval_top_p", "1.0"),
        Mutant("recipe: --eval-max-new-tokens is forgotten", "Results.__init__", "options.run.eval_max_new_tokens or options", "options"),
        Mutant("recipe: --eval-samples is forgotten", "Results.__init__", "self.samples = options.run.eval_samples", "self.samples = 1"),
        Mutant("recipe: the table splits at another tau", "Results.__init__", "StepTotals(options.loss.tau", "StepTotals(0.8"),
        Mutant("recipe: --seed does not reach the evaluation", "Results.sampled", 'f"{self.options.training.seed}/{name}"', 'f"0/{name}"'),
    ]),
    *of_the_recipe("held_out", [
        Mutant("recipe: batches are put together as they come", "Results.evaluated", "for at in range(len(batches))), strict=True)", "for at in reversed(range(len(batches)))), strict=True)"),
        Mutant("recipe: a prompt's samples are another's", "Results.evaluated", "for prompt in scenario.held_out[name] for _ in range(self.samples)]", "for _ in range(self.samples) for prompt in scenario.held_out[name]]"),
        Mutant("recipe: the teacher is sampled for every model", "Results.evaluated", "if (name, at) not in self.reference:", "if True:"),
        Mutant("recipe: --eval-sets are forgotten", "evaluation_sets", "options.run.eval_sets or []", "[]"),
        Mutant("recipe: a set is read from the training split", "evaluation_sets", "prompts_split=split", "prompts_split=prompts.prompts_split"),
        Mutant("recipe: a set of the hub has the training prompts' columns", "evaluation_sets", 'replace(prompts, prompt_column=column, answer_column="answer")', "prompts"),
        Mutant("recipe: --eval-steps is forgotten", "TrainingOptions.__post_init__", 'self.eval_strategy = "steps"', "pass"),
        Mutant("recipe: the last step is evaluated twice", "OnPolicyTrainer.evaluate", "self.state.global_step < self.state.max_steps", "True"),
        Mutant("recipe: an evaluation between steps is told to no logger", "OnPolicyTrainer.evaluate", "            self.log(found)\n", ""),
        Mutant("recipe: an interrupted evaluation begins anew", "Results.add", "one not in done", "True"),
        Mutant("recipe: logged figures are the next completion's", "OnPolicyTrainer.figures", "[batch][row,", "[batch][row - 1,"),
        Mutant("recipe: logged tokens lose a split character", "rollouts.pieces", "begin, end = end, at", "begin, end = at, at"),
    ]),
    *of_the_recipe("page", [
        Mutant("recipe: the page underlines every token", "tokens.one_token", 'class_="gate" if figures[GATE] else ""', 'class_="gate"'),
        Mutant("recipe: the page's colours have a scale each", "tokens.one_token", "/ (largest or 1)", "/ (figures[ENTROPY] or 1)"),
        Mutant("recipe: the page draws a curve through one point", "pass_at_k_curves", "default=0) < 2:", "default=0) < 1:"),
    ]),
    *of_the_recipe("served_teacher", [
        Mutant("recipe: a served teacher's k is the default's", "load_scenario", 'max(one.top_k.get("teacher", 0) for one in options.loss.objectives.values()) or TopK().k', "TopK().k"),
        Mutant("recipe: --teacher-timeout is forgotten", "load_scenario", "timeout=timeout", "timeout=300.0"),
        Mutant("recipe: a served row is about the next token", "ServedTeacher.rows", '["prompt_logprobs"][start:]', '["prompt_logprobs"][start - 1 :]'),
        Mutant("recipe: SGLang's rows begin with the token", "ServedTeacher.rows", "logprob_start_len=start - 1", "logprob_start_len=start"),
        Mutant("recipe: a served row may be about another token", "ServedTeacher.rows", "i in row and ", ""),
        Mutant("recipe: the token's own entry is one of the k", "ServedTeacher.rows", "[: self.k]", ""),
        Mutant("recipe: a served token's log-probability is the likeliest's", "ServedTeacher.rows", "(row[i][0], sorted", "(max(row.values())[0], sorted"),
        Mutant("recipe: ids that the student lacks are entries", "ServedTeacher.forward", "ids.where(ids < self.vocab_size, -1)", "ids"),
        Mutant("recipe: a server's samples are drawn as its config has it", "ServedTeacher.sample", "{**PLAIN, ", "{"),
        Mutant("recipe: a server has one seed", "ServedTeacher.sample", "by: seed", "by: 0"),
        Mutant("recipe: a server is asked once", "ServedTeacher.answer", "time.monotonic() + self.timeout", "0.0"),
        Mutant("recipe: a served teacher's table has the paper's top k", "evaluation.compared", 'TopK(teacher="raw", tail=True)', "TopK()"),
        Mutant("recipe: nobody compares tokenizers with a server", "ServedTeacher.share_vocabulary", "ours.strip() != text.strip()", "False"),
    ]),
    *of_the_recipe("distill_program", [
        Mutant("recipe: --eval-prompt-suffix is forgotten", "held_out.evaluated", "prompt_suffix=suffix", "prompt_suffix=prompts.prompt_suffix"),
        Mutant("recipe: --prompt-suffix is forgotten", "prompts.encode", "found += options.prompt_suffix", "pass"),
        Mutant("recipe: --enable-thinking is forgotten", "PromptOptions.template_arguments", "{**found, **thinking}", "found"),
    ]),
    *of_the_recipe("distill_resume", [
        Mutant("recipe: a checkpoint forgets the rest of a rollout", "OnPolicyTrainer._save_rng_state", "if self.drawn:", "if False:"),
        Mutant("recipe: a resumed rollout forgets its log-probabilities", "OnPolicyTrainer._load_optimizer_and_scheduler", "Completion(**one)", 'Completion(**one | {"log_probs": [0.0] * len(one["ids"])})'),
    ]),
    *of_the_recipe("distill_processes", [
        Mutant("recipe: each process has its own denominator", "OnPolicyTrainer.get_batch_samples", 'self.accelerator.reduce(tokens, "sum")', "tokens"),
        Mutant("recipe: a process waits for another as long as a collective does", "processes.gathered", "group=patient_group(dist.group.WORLD)", "group=None"),
        Mutant("recipe: gradients are averaged over processes once more", "OnPolicyTrainer.compute_loss", "        loss = loss * self.accelerator.num_processes\n", ""),
    ]),
]  # fmt: skip
