"""The demonstration's models: a small teacher trained on the coin task, and a smaller student trained briefly."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from . import coins
from .models import described, small_llama
from .options import Options
from .prompts import Prompt
from .report import say
from .rollouts import left_pad
from .run_folder import RunFolder
from .training import train_supervised

TRAINING_PROBLEMS = 20_000
SUPERVISED_BATCH = 128
TEACHER, START = "teacher", "student-start"


def coin_prompts(options: Options, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """The problems to train on and the held-out ones."""
    found = []
    for problems in coins.draw_problems(TRAINING_PROBLEMS, options.run.eval_prompts, options.training.seed):
        texts = [problem.prompt for problem in problems]
        encoded = tokenizer(texts)["input_ids"]
        found.append([Prompt(ids, text) for ids, text in zip(encoded, texts, strict=True)])
    return found[0], found[1]


def build_models(options: Options, folder: RunFolder, device: torch.device) -> None:
    """Trains what is not yet in the run folder."""
    tokenizer = coins.build_tokenizer()
    seed = options.training.seed
    training, held_out = coins.draw_problems(TRAINING_PROBLEMS, options.run.eval_prompts, seed)
    longest = max(len(tokenizer(problem.prompt)["input_ids"]) for problem in training + held_out)
    positions = longest + max(options.rollouts.max_new_tokens, coins.LONGEST_ANSWER)
    for name, label, hidden_size, layers, steps in (
        (TEACHER, "teacher", 128, 4, options.run.teacher_steps),
        (START, "student", 96, 2, options.run.student_steps),
    ):
        if (folder.path / name).exists():
            continue
        torch.manual_seed(seed)
        model = small_llama(tokenizer, hidden_size, layers, positions, device)
        say(f"training the {label} on right answers: {described(model)}, {steps} steps of {SUPERVISED_BATCH}")
        batches = supervised_batches(training, tokenizer, random.Random(seed), device)
        train_supervised(model, batches, steps=steps, learning_rate=3e-3, label=label)
        folder.save_pretrained(name, model, tokenizer)


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
