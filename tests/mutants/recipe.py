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
        Mutant("recipe: old log-probabilities are those of now", "training.score", "old_log_probs=rollouts.log_probs if sampled else None", "old_log_probs=entropy_aware_kl(student_hidden.detach(), teacher_hidden, student_head=LMHead.from_model(student), teacher_head=LMHead.from_model(teacher), token_ids=rollouts.completion_ids).student_log_probs if sampled else None"),
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
        Mutant("recipe: --eval-top-p is forgotten", "Results.sampled", '"top_p": options.run.eval_top_p', '"top_p": 1.0'),
        Mutant("recipe: --eval-max-new-tokens is forgotten", "Results.sampled", "options.run.eval_max_new_tokens or options", "options"),
        Mutant("recipe: --eval-samples is forgotten", "Results.sampled", "for _ in range(options.run.eval_samples)", "for _ in range(1)"),
        Mutant("recipe: --teacher-dtype is forgotten", "load_scenario", "teacher_name, models.teacher_dtype, device", 'teacher_name, "float32", device'),
        Mutant("recipe: --student-dtype is forgotten", "scenarios.load_student", "models.student_dtype, device", '"float32", device'),
        Mutant("recipe: --completion-column leaves the student to sample", "distill.answering", "if options.prompts.completion_column is not None:", "if False:"),
        Mutant("recipe: the table splits at another tau", "Results.evaluated", "self.options.loss.tau", "0.8"),
    ]),
    *of_the_recipe("distill_program", [
        Mutant("recipe: --eval-prompt-suffix is forgotten", "load_scenario", "prompt_suffix=suffix", "chat=options.prompts.chat"),
        Mutant("recipe: --prompt-suffix is forgotten", "prompts.encode", "found += options.prompt_suffix", "pass"),
        Mutant("recipe: --prompt-column is forgotten", "prompts.question", "record.get(options.prompt_column)", 'record.get("prompt")'),
        Mutant("recipe: --chat is forgotten", "prompts.encode", "if options.chat:", "if False:"),
        Mutant("recipe: --completion-column is forgotten", "prompts.given", "record.get(options.completion_column)", 'record.get("completion")'),
        Mutant("recipe: --enable-thinking is forgotten", "PromptOptions.template_arguments", "{**found, **thinking}", "found"),
    ]),
    *of_the_recipe("distill_traps", [
        Mutant("recipe: --max-prompt-tokens is forgotten", "scenarios.split", "if limit is None or len(prompt.ids) <= limit", "if True"),
        Mutant("recipe: --optim is found out by the trainer", "TrainingOptions.__post_init__", "if self.optim_target_modules is None:", "if False:"),
    ]),
    *of_the_recipe("lora", [
        Mutant("recipe: --lora-r is forgotten", "scenarios.load_student", "name, models.lora_r", "name, None"),
        Mutant("recipe: an adapter in a folder is forgotten", "scenarios.load_student", "None if base == name else name", "None"),
        Mutant("recipe: --seed does not reach a new adapter", "scenarios.load_student", "options.training.seed", "0"),
        Mutant("recipe: an adapter's scale is 1", "models.with_adapter", "2 * lora_r", "lora_r"),
        Mutant("recipe: an adapter's student samples by a config of its own", "rollouts.sample", "inner = without_wrapper(model)", "inner = model"),
        Mutant("recipe: completions are drawn outside of autocast", "distill.answering", '"autocast": trainer.accelerator.autocast,', ""),
        Mutant("recipe: --teacher-quantization is forgotten", "load_scenario", "models.attn_implementation, bits)", "models.attn_implementation)"),
        Mutant("recipe: sums want float64", "StepTotals.__init__", "dtype=widest_dtype(device)", "dtype=torch.float64"),
        Mutant("recipe: draws want float64", "rollouts.sample", "numbers.to(widest_dtype(model.device))", "numbers"),
    ]),
    *of_the_recipe("plan", [
        Mutant("recipe: the plan forgets DDP's buckets", "plan.planned", "if processes > 1 and not stage else 0", "if False else 0"),
        Mutant("recipe: the plan shares out no weights", "plan.shared_out", "return 3", "return 2"),
        Mutant("recipe: the plan forgets checkpointing", "plan.activations", "if not checkpointing:", "if True:"),
        Mutant("recipe: the plan forgets --optim", "plan.states", "return count * (", "return 2 * ("),
        Mutant("recipe: the plan forgets --lora-r", "plan.hollow", "with_adapter(model, None, rank)", "model"),
        Mutant("recipe: the plan forgets a layer's second run", "plan.planned", "max(blocks, layer)", "blocks"),
        Mutant("recipe: the plan forgets --evaluation-batch-size", "plan.planned", "judged = options.run.evaluation_batch_size", "judged = 16"),
        Mutant("recipe: the plan forgets --eval-max-new-tokens", "plan.planned", "options.run.eval_max_new_tokens or rollouts", "rollouts"),
        Mutant("recipe: the plan forgets --generation-batch-size", "plan.planned", "rollouts.generation_batch_size or drawn", "drawn"),
        Mutant("recipe: the plan forgets the square of the length", "plan.activations", " + square * tokens**2", ""),
        Mutant("recipe: nobody is warned", "plan.warn_where_it_exceeds", "if has is not None and needed > has:", "if False:"),
        Mutant("recipe: the trainer stays for the evaluation", "distill.run", "gc.collect()", "pass"),
    ]),
    *of_the_recipe("distill_resume", [
        Mutant("recipe: a checkpoint forgets the rest of a rollout", "OnPolicyTrainer._save_rng_state", "if self.drawn:", "if False:"),
        Mutant("recipe: a resumed rollout forgets its log-probabilities", "OnPolicyTrainer._load_optimizer_and_scheduler", "Completion(**one)", 'Completion(**one | {"log_probs": [0.0] * len(one["ids"])})'),
    ]),
    *of_the_recipe("distill_processes", [
        Mutant("recipe: each process has its own denominator", "OnPolicyTrainer.get_batch_samples", 'self.accelerator.reduce(tokens, "sum")', "tokens"),
        Mutant("recipe: gradients are averaged over processes once more", "OnPolicyTrainer.compute_loss", "        loss = loss * self.accelerator.num_processes\n", ""),
    ]),
]  # fmt: skip
