"""What is distilled into what: two models, checked against each other, and prompts, checked against both."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .answers import is_right
from .coins import Payment
from .demonstration import START, TEACHER, coin_prompts
from .errors import UsageError
from .models import (
    align_ends,
    base_of,
    check_head,
    described,
    known,
    load_model,
    load_tokenizer,
    shared_vocabulary,
    with_adapter,
)
from .options import Options
from .plan import warn_where_it_exceeds
from .prompts import Prompt, encode_prompts, records, warn_of_missing_answers
from .report import say
from .run_folder import RunFolder


@dataclass(frozen=True)
class Scenario:
    """A teacher, the student's start as a folder or hub name, and prompts; ``vocab_size`` ids are known to both."""

    task: str
    teacher: PreTrainedModel
    start: str
    tokenizer: Tokenizer
    eos_ids: list[int]
    training: list[Prompt]
    held_out: list[Prompt]
    vocab_size: int
    options: Options
    device: torch.device

    def load_student(self, name: str | None = None) -> PreTrainedModel:
        """The student at its start, or as a folder has it, ending sequences as the teacher does."""
        student = load_student(self.options, name or self.start, self.device)
        student.generation_config.eos_token_id = self.eos_ids
        return student

    def check(self, prompt: Prompt) -> Callable[[str], bool] | None:
        """Says of a completion whether it is right; None where nobody knows."""
        if self.task == "coins":
            return Payment.parse(prompt.text).accepts
        check = self.options.prompts.answer_check
        return None if prompt.answer is None else partial(is_right, answer=prompt.answer, check=check)


def load_scenario(options: Options, folder: RunFolder, device: torch.device) -> Scenario:
    """The models and prompts of the command line, or those of the demonstration, checked before anything is trained."""
    models = options.models
    teacher_name = models.teacher or str(folder.path / TEACHER)
    start = models.student or str(folder.path / START)
    rows = [] if options.demo else list(records(options.prompts))  # the cheapest to be wrong about goes first
    for argument, name in (("--student", start), ("--teacher", teacher_name)):
        if not known(name):
            raise UsageError(argument, f"{name!r} is no folder here, and no name on the hub either")
    base = base_of("--student", start)
    if base != start and models.lora_r is not None:
        raise UsageError("--lora-r", f"{start!r} is an adapter already, which is trained without it")
    if options.rollouts.rollout_engine == "vllm" and (base != start or models.lora_r is not None):
        raise UsageError("--rollout-engine", "vllm is handed whole weights, which a student with an adapter has not")
    tokenizer = load_tokenizer("--student", start if Path(start, "tokenizer_config.json").exists() else base)
    teacher_tokenizer = load_tokenizer("--teacher", teacher_name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = teacher_tokenizer.chat_template
    if options.demo:
        training, held_out = coin_prompts(options, tokenizer)
    else:
        training, held_out = split(options, encode_prompts(rows, options.prompts, tokenizer))
        if (suffix := options.prompts.eval_prompt_suffix) is not None:
            of_place, otherwise = dict(rows), replace(options.prompts, prompt_suffix=suffix)
            held_out = encode_prompts([(one.place, of_place[one.place]) for one in held_out], otherwise, tokenizer)
        warn_of_missing_answers(rows, options.prompts, held_out)
        if any(prompt.answer for prompt in held_out) and importlib.util.find_spec("math_verify") is None:
            raise UsageError("--answer-column", "answers are read by math-verify, which is not installed")
    if not options.demo:
        warn_where_it_exceeds(options, device, max(len(prompt.ids) for prompt in training + held_out))
    bits = models.teacher_quantization
    teacher = load_model("--teacher", teacher_name, models.teacher_dtype, device, models.attn_implementation, bits)
    teacher.requires_grad_(False)
    student = load_student(options, start, device)
    vocab_size = shared_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    eos_ids = align_ends(student, teacher, tokenizer, teacher_tokenizer, vocab_size)
    if not eos_ids:
        raise UsageError("--student", f"neither {start!r} nor the teacher names an end-of-sequence token")
    check_prompts(options, training + held_out, student, teacher, vocab_size)
    check_head("--teacher", teacher, (training + held_out)[0].ids)
    check_head("--student", student, (training + held_out)[0].ids)
    if not options.demo:
        say(f"teacher: {described(teacher)}; student: {described(student)}")
        say(f"{len(training)} prompts to train on, {len(held_out)} held out")
        names = ", ".join(repr(tokenizer.decode([i])) for i in eos_ids)
        say(f"a completion ends with {names}; the {vocab_size} ids that both models have are compared")
    task = "coins" if options.demo else str(options.prompts.prompts)
    return Scenario(task, teacher, start, tokenizer, eos_ids, training, held_out, vocab_size, options, device)


def load_student(options: Options, name: str, device: torch.device) -> PreTrainedModel:
    """A student from its folder or hub name, or the base of the adapter that is there, with it; the same every time."""
    models, base = options.models, base_of("--student", name)
    student = load_model("--student", base, models.student_dtype, device, models.attn_implementation)
    torch.manual_seed(options.training.seed)  # of a new adapter
    return with_adapter(student, None if base == name else name, models.lora_r)


def split(options: Options, prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and those held out."""
    limit, held = options.prompts.max_prompt_tokens, options.run.eval_prompts
    fitting = [prompt for prompt in prompts if limit is None or len(prompt.ids) <= limit]
    if longer := len(prompts) - len(fitting):
        say(f"{longer} of {len(prompts)} prompts exceed --max-prompt-tokens {limit} and are left out")
    if len(fitting) <= held:
        kept = f"holds {len(fitting)} different prompts and --eval-prompts keeps {held} of them for evaluation"
        raise UsageError("--prompts", f"{kept}; nothing is left to train on")
    shuffled = random.Random(options.training.seed).sample(fitting, len(fitting))
    return shuffled[held:], shuffled[:held]


def check_prompts(
    options: Options, prompts: list[Prompt], student: PreTrainedModel, teacher: PreTrainedModel, vocab_size: int
) -> None:
    """Refuses prompts that are unknown to a model, or that leave no room for a completion."""
    if max(max(prompt.ids) for prompt in prompts) >= vocab_size:
        raise UsageError("--prompts", f"contains tokens beyond the {vocab_size} ids that both models have")
    given = [prompt.completion for prompt in prompts if prompt.completion is not None]
    if given and max(max(ids) for ids in given) >= vocab_size:
        raise UsageError("--completion-column", f"contains tokens beyond the {vocab_size} ids that both models have")
    new = max(options.rollouts.max_new_tokens, options.run.eval_max_new_tokens or 0)
    longest = max(len(prompt.ids) for prompt in prompts) + new
    for name, model in (("teacher", teacher), ("student", student)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                "--max-new-tokens",
                f"the longest prompt and {new} new tokens make {longest}, but the {name} has {limit} positions",
            )
