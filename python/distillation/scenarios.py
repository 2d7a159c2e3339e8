"""What is distilled into what: the demonstration's own small models and task, or models and prompts of the user's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from . import coins
from .errors import UsageError
from .models import check_head, load_model, load_tokenizer, shared_vocabulary, small_llama
from .options import Options
from .prompts import encode_prompts, read_prompts
from .report import progress, say
from .rollouts import end_of_sequence_ids, left_pad
from .training import train_supervised

TRAINING_PROBLEMS = 20_000
SUPERVISED_BATCH = 128


@dataclass(frozen=True)
class Scenario:
    """Two models that share a vocabulary, prompts as token ids, and a check per held-out prompt if there is one."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: Tokenizer
    training_prompts: list[list[int]]
    held_out_prompts: list[list[int]]
    checks: list[Callable[[str], bool]] | None
    vocab_size: int


def pick_device(options: Options) -> torch.device:
    """The device asked for; 'auto' is CUDA if there is one, except in the demonstration, which is made for a CPU."""
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not options.demo else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError("--device", f"cannot use {options.device!r}: {reason}") from error
    return device


def own_models(options: Options, device: torch.device) -> Scenario:
    """The models and prompts of the command line, checked against each other before anything is trained."""
    assert options.teacher is not None and options.student is not None and options.prompts is not None
    texts = read_prompts(options.prompts)
    tokenizer = load_tokenizer("--student", options.student)
    teacher_tokenizer = load_tokenizer("--teacher", options.teacher)
    teacher = load_model("--teacher", options.teacher, options.torch_dtype, device)
    student = load_model("--student", options.student, options.student_dtype, device)
    teacher.requires_grad_(False)
    if not end_of_sequence_ids(student, tokenizer):
        raise UsageError("--student", f"{options.student!r} names no end-of-sequence token")
    vocab_size = shared_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    prompts = encode_prompts(tokenizer, texts)
    if len(prompts) <= options.eval_prompts:
        raise UsageError(
            "--prompts",
            f"holds {len(prompts)} different prompts and --eval-prompts keeps {options.eval_prompts} of them for "
            "evaluation; nothing is left to train on",
        )
    if max(max(prompt) for prompt in prompts) >= vocab_size:
        raise UsageError("--prompts", f"contains tokens beyond the {vocab_size} ids that both models have")
    longest = max(len(prompt) for prompt in prompts) + options.max_new_tokens
    for name, model in (("teacher", teacher), ("student", student)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                "--max-new-tokens",
                f"the longest prompt and {options.max_new_tokens} new tokens make {longest}, but the {name} has "
                f"{limit} positions",
            )
    check_head("--teacher", teacher, prompts[0])
    check_head("--student", student, prompts[0])
    shuffled = random.Random(options.seed).sample(prompts, len(prompts))
    training, held_out = shuffled[options.eval_prompts :], shuffled[: options.eval_prompts]
    say(f"teacher: {described(teacher)}; student: {described(student)}")
    say(f"{len(training)} prompts to train on, {len(held_out)} held out")
    return Scenario(teacher, student, tokenizer, training, held_out, None, vocab_size)


def demonstration(options: Options, device: torch.device) -> Scenario:
    """A small teacher trained on the coin task, and a smaller student trained briefly, to have a start."""
    tokenizer = coins.build_tokenizer()
    training, held_out = coins.draw_problems(TRAINING_PROBLEMS, options.eval_prompts, options.seed)
    prompts = tokenizer([problem.prompt for problem in training + held_out])["input_ids"]
    positions = max(len(prompt) for prompt in prompts) + max(options.max_new_tokens, coins.LONGEST_ANSWER)
    trained = {}
    for name, hidden_size, layers, steps in (
        ("teacher", 128, 4, options.teacher_steps),
        ("student", 96, 2, options.student_steps),
    ):
        torch.manual_seed(options.seed)
        model = small_llama(tokenizer, hidden_size, layers, positions, device)
        say(f"training the {name} on right answers: {described(model)}, {steps} steps of {SUPERVISED_BATCH}")
        batches = supervised_batches(training, tokenizer, random.Random(options.seed), device)
        losses = train_supervised(model, batches.__next__, steps=steps, learning_rate=3e-3)
        for _ in progress(losses, steps, name):
            pass
        trained[name] = model
    trained["teacher"].requires_grad_(False)
    return Scenario(
        trained["teacher"],
        trained["student"],
        tokenizer,
        prompts[: len(training)],
        prompts[len(training) :],
        [problem.accepts for problem in held_out],
        len(tokenizer),
    )


def supervised_batches(
    problems: list[coins.Payment], tokenizer: Tokenizer, rng: random.Random, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, attention mask and labels (−100 on prompt and padding), [B, L] each, without end."""
    while True:
        drawn = rng.choices(problems, k=SUPERVISED_BATCH)
        texts = [f"{problem.prompt} {problem.draw_answer(rng)} {tokenizer.eos_token}" for problem in drawn]
        input_ids, attention_mask = left_pad(tokenizer(texts)["input_ids"], tokenizer.pad_token_id, device)
        labels = torch.full_like(input_ids, -100)
        for row, label_row, problem in zip(input_ids, labels, drawn, strict=True):
            answer = slice(-problem.answer_tokens, None)
            label_row[answer] = row[answer]
        yield input_ids, attention_mask, labels


def described(model: PreTrainedModel) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    return f"{type(model).__name__} of {size} parameters"
