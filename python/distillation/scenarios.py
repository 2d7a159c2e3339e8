"""What is distilled into what: two models, checked against each other, and prompts, checked against both."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import TopK

from .answers import is_right
from .coins import Payment
from .demonstration import START, TEACHER, coin_prompts
from .errors import UsageError
from .held_out import HELD_OUT, evaluated, evaluation_sets
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
from .served_teacher import ServedTeacher
from .teachers import Single, Teacher, Teachers, teachers_of


@dataclass(frozen=True)
class Scenario:
    """A teacher, the student's start as a folder or hub name, and prompts; ``vocab_size`` ids are known to both."""

    task: str
    teacher: Teacher
    start: str
    tokenizer: Tokenizer
    eos_ids: list[int]
    training: list[Prompt]
    held_out: dict[str, list[Prompt]]  # by the set's name
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
    sources = {"": str(folder.path / TEACHER)} if options.demo else models.teachers
    start = models.student or str(folder.path / START)
    rows = [] if options.demo else list(records(options.prompts))  # the cheapest to be wrong about goes first
    sets = list(evaluation_sets(options))
    local = [("--teacher", name) for name in sources.values() if models.teacher_url is None]
    for argument, name in (("--student", start), *local):
        if not known(name):
            raise UsageError(argument, f"{name!r} is no folder here, and no name on the hub either")
    base = base_of("--student", start)
    if base != start and models.lora_r is not None:
        raise UsageError("--lora-r", f"{start!r} is an adapter already, which is trained without it")
    if options.rollouts.rollout_engine == "vllm" and (base != start or models.lora_r is not None):
        raise UsageError("--rollout-engine", "vllm is handed whole weights, which a student with an adapter has not")
    tokenizer = load_tokenizer("--student", start if Path(start, "tokenizer_config.json").exists() else base)
    served: dict[str, ServedTeacher] = {}
    if models.teacher_url is not None:
        k = max(one.top_k.get("teacher", 0) for one in options.loss.objectives.values()) or TopK().k
        served = {name: ServedTeacher(url, k, models.teacher_timeout, device) for name, url in sources.items()}
    tokenizers = {name: tokenizer if served else load_tokenizer("--teacher", of) for name, of in sources.items()}
    if tokenizer.chat_template is None:
        tokenizer.chat_template = next(iter(tokenizers.values())).chat_template
    if options.demo:
        training, held = coin_prompts(options, tokenizer)
        held_out = {HELD_OUT: held}
    else:
        training, held = split(options, encode_prompts(rows, options.prompts, tokenizer))
        of_place, held_out = dict(rows), {}
        if held:
            sets.insert(0, (HELD_OUT, evaluated(options.prompts), [(one.place, of_place[one.place]) for one in held]))
        for name, its, found in sets:
            held_out[name] = encode_prompts(found, its, tokenizer)
            warn_of_missing_answers(found, its, held_out[name])
        if (
            any(prompt.answer for prompts in held_out.values() for prompt in prompts)
            and importlib.util.find_spec("math_verify") is None
        ):
            raise UsageError("--answer-column", "answers are read by math-verify, which is not installed")
    everything = sum(held_out.values(), training)
    of_prompt = {} if "" in sources else teachers_of(everything, sources)
    if not options.demo:
        warn_where_it_exceeds(options, device, max(len(prompt.ids) for prompt in everything))
    student = load_student(options, start, device)
    bits, attention = models.teacher_quantization, models.attn_implementation
    loaded = {of: load_model("--teacher", of, models.teacher_dtype, device, attention, bits) for _, of in local}
    named: dict[str, Single] = {}
    sizes, eos_ids = [], list[int]()
    for name, source in sources.items():
        if served:
            named[name] = served[name]
            sizes.append(served[name].share_vocabulary(student, tokenizer, [prompt.ids for prompt in everything]))
        else:
            named[name] = loaded[source].requires_grad_(False)
            sizes.append(shared_vocabulary(student, loaded[source], tokenizer, tokenizers[name]))
            eos_ids = align_ends(student, loaded[source], tokenizer, tokenizers[name], sizes[-1])
    vocab_size = min(sizes)
    if served:
        eos_ids = align_ends(student, student, tokenizer, tokenizer, vocab_size)
    if not eos_ids:
        raise UsageError("--student", f"neither {start!r} nor the teacher names an end-of-sequence token")
    check_prompts(options, everything, [*named.values(), student], vocab_size)
    check_head("--student", student, training[0].ids)
    for one in loaded.values():
        check_head("--teacher", one, training[0].ids)
        one.generation_config.eos_token_id = eos_ids
    if not options.demo:
        about = {name: one.name if isinstance(one, ServedTeacher) else described(one) for name, one in named.items()}
        taught = ", ".join(f"{name}: {what}" if name else what for name, what in about.items())
        say(f"teacher: {taught}; student: {described(student)}")
        say(f"{len(training)} prompts to train on, {sum(map(len, held_out.values()))} held out")
        names = ", ".join(repr(tokenizer.decode([i])) for i in eos_ids)
        say(f"a completion ends with {names}; the {vocab_size} ids that both models have are compared")
    task = "coins" if options.demo else str(options.prompts.prompts)
    teacher = named[""] if "" in named else Teachers(named, of_prompt)
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
    options: Options,
    prompts: list[Prompt],
    models: list[Single],
    vocab_size: int,
) -> None:
    """Refuses prompts that are unknown to a model, or that leave no room for a completion."""
    if max(max(prompt.ids) for prompt in prompts) >= vocab_size:
        raise UsageError("--prompts", f"contains tokens beyond the {vocab_size} ids that both models have")
    given = [prompt.completion for prompt in prompts if prompt.completion is not None]
    if given and max(max(ids) for ids in given) >= vocab_size:
        raise UsageError("--completion-column", f"contains tokens beyond the {vocab_size} ids that both models have")
    new = max(options.rollouts.max_new_tokens, options.run.eval_max_new_tokens or 0)
    longest = max(len(prompt.ids) for prompt in prompts) + new
    for model in models:  # the student is the last
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                "--max-new-tokens",
                f"the longest prompt and {new} new tokens make {longest}, but the "
                f"{'student' if model is models[-1] else 'teacher'} has {limit} positions",
            )
