"""What is measured on held-out prompts: right answers, and what a student does where the teacher is uncertain.

Each sample of each prompt has random numbers of its own, the same for every model. Samples are drawn and scored in
batches, which are dealt to the processes: a batch is the same wherever it is run, and the sums of the batches are added
up in their order, so that the figures are those of one process to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import EntropyAwareKLOutput, Objective

from .answering import SampledAnswers
from .metrics import StepTotals
from .options import Options
from .processes import gathered
from .report import duration, say
from .rollouts import Completion, collate, text_of
from .scenarios import Scenario
from .stream import Draw
from .training import score

WORTH_SAYING = 60.0  # seconds
Check = Callable[[str], bool]
Within = Callable[[Callable[[], EntropyAwareKLOutput]], EntropyAwareKLOutput]


def at_once(function: Callable[[], EntropyAwareKLOutput]) -> EntropyAwareKLOutput:
    return function()


def right(completions: Sequence[Completion], tokenizer: Tokenizer, checks: Sequence[Check]) -> list[int]:
    """Whether each completion is right by its check, which sees the text before the end of the sequence, 0 or 1.

    An answer that never ends is wrong. :mod:`distillation.success` makes Avg@k, Pass@k and their intervals of them.
    """
    return [int(one.ended and check(text_of(one, tokenizer))) for one, check in zip(completions, checks, strict=True)]


def agreement(totals: StepTotals, sums: Tensor) -> dict[str, float | None]:
    """Entropies and forward KL (nats) split at the ``tau`` of ``totals``, of ``sums`` that were added up.

    A mean over no tokens is None.
    """
    found = totals.metrics(sums)
    return {
        "tokens": found["tokens"],
        "uncertain_fraction": sums[totals.places["tokens_open"]].item() / (found["tokens"] or 1),
        "teacher_entropy_uncertain": found["teacher_entropy_open"],
        "student_entropy_uncertain": found["student_entropy_open"],
        "forward_kl_uncertain": found["forward_kl_open"],
        "forward_kl_certain": found["forward_kl_closed"],
    }


def dealt(batches: int, synced: bool) -> list[int]:
    """This process's batches, in their order; ``synced``: as many for each, some of them another's as well."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, batches, ranks)
    return [*mine, *[batches - 1] * (math.ceil(batches / ranks) - len(mine) if synced else 0)]


class Evaluation:
    """Figures of any model on one set of held-out prompts at a time; every process takes part.

    What the teacher wrote is kept: it is sampled once, for all models.
    """

    def __init__(self, options: Options, scenario: Scenario) -> None:
        self.options = options
        self.scenario = scenario
        self.totals = StepTotals(options.loss.tau, scenario.vocab_size, scenario.device)
        self.reference: dict[tuple[str, int], list[Completion]] = {}

        self.longest = options.run.eval_max_new_tokens or options.rollouts.max_new_tokens

    def batches(self, name: str) -> list[list[Draw]]:
        """All samples of a set's prompts, side by side: the n-th draw is a sample of prompt n // samples."""
        samples, size = self.options.run.eval_samples, self.options.run.evaluation_batch_size
        prompts = [prompt for prompt in self.scenario.held_out[name] for _ in range(samples)]
        draws = [Draw(number, prompt) for number, prompt in enumerate(prompts)]
        return [draws[start : start + size] for start in range(0, len(draws), size)]

    def checks(self, name: str) -> list[Check] | None:
        """A check per prompt of a set; None where some prompt has none."""
        found = [check for prompt in self.scenario.held_out[name] if (check := self.scenario.check(prompt)) is not None]
        return found if len(found) == len(self.scenario.held_out[name]) else None

    def sampled(self, model: PreTrainedModel, name: str, draws: list[Draw], synced: bool = False) -> list[Completion]:
        """A completion per draw of a set."""
        answers = SampledAnswers(
            model,
            self.scenario.teacher,
            self.scenario.tokenizer,
            seed=f"{self.options.training.seed}/{name}",
            max_new_tokens=self.longest,
            vocab_size=self.scenario.vocab_size,
            top_p=self.options.run.eval_top_p,
            synced=synced,
        )
        return answers(draws)

    def measured(
        self, name: str, model: PreTrainedModel, at: int, draws: list[Draw], within: Within, synced: bool
    ) -> tuple[list[float], list[int], int]:
        """Of one batch: sums on the teacher's samples, which of the model's are right, and the longest of these."""
        scenario, checks = self.scenario, self.checks(name)
        if (name, at) not in self.reference:
            self.reference[name, at] = self.sampled(scenario.teacher, name, draws)
        answers = self.reference[name, at]
        rollouts = collate(answers, scenario.tokenizer.pad_token_id, scenario.device)
        forward = Objective.forward_kl()
        seen = within(lambda: score(model, scenario.teacher, rollouts, forward, vocab_size=scenario.vocab_size))
        self.totals.sums.zero_()
        self.totals.add_tokens(seen, seen.loss, rollouts.completion_mask)
        correct = []
        if checks is not None:
            if model is not scenario.teacher:
                answers = self.sampled(model, name, draws, synced)
            its = [checks[draw.number // self.options.run.eval_samples] for draw in draws]
            correct = right(answers, scenario.tokenizer, its)
        return self.totals.sums.tolist(), correct, max(len(one.ids) for one in answers)

    @torch.no_grad()
    def figures(
        self, name: str, model: PreTrainedModel, label: str, *, within: Within = at_once, synced: bool = False
    ) -> dict[str, Any]:
        """``correct``, 0 or 1 ``[prompts][samples]`` or None where that cannot be said, and ``agreement``, of one set.

        Args:
            name: of the set.
            label: of the model, for what is said meanwhile.
            within: calls what it is given where the parameters of ``model`` are whole.
            synced: whether the processes share the parameters of ``model``, and so have to run it together.
        """
        batches, samples, training = self.batches(name), self.options.run.eval_samples, model.training
        mine = dealt(len(batches), synced)
        own: dict[int, tuple[list[float], list[int]]] = {}  # by the batch: sums, and what is right
        started = time.perf_counter()
        model.eval()
        with torch.autocast(self.scenario.device.type, torch.bfloat16, enabled=self.options.training.bf16):
            for at in tqdm(mine, desc=f"{label}: {name}", leave=False, disable=None, dynamic_ncols=True):
                sums, correct, longest = self.measured(name, model, at, batches[at], within, synced)
                own[at] = sums, correct
                at_most = (time.perf_counter() - started) * self.longest / longest * len(mine)
                if len(own) == 1 and at_most >= WORTH_SAYING:
                    say(f"  {label}, {name}: at most {duration(at_most)}, by the speed of its first batch")
        model.train(training)
        every = {at: found for share in gathered(own) for at, found in share.items()}
        all_sums, outcomes = zip(*(every[at] for at in range(len(batches))), strict=True)
        return {
            "correct": np.concatenate(outcomes).reshape(-1, samples).tolist() if outcomes[0] else None,
            "agreement": agreement(self.totals, torch.tensor(all_sums, dtype=torch.float64).sum(0)),
        }

    def cost(self, trained: int, in_training: int) -> str:
        """What all of it samples at most: the teacher, the student's start and its ``trained`` ends, and on the way."""
        samples, sets = self.options.run.eval_samples, self.scenario.held_out
        tokens = {name: len(prompts) * samples * self.longest for name, prompts in sets.items()}
        students = 1 + trained + in_training
        most = sum(count * (1 + students * (self.checks(name) is not None)) for name, count in tokens.items())
        parts = " + ".join(f"{len(prompts)} ({name})" for name, prompts in sets.items())
        return (
            f"evaluation: {parts} prompts × {samples} samples × {self.longest} new tokens are at most "
            f"{sum(tokens.values()):,} tokens\nof a model; the teacher once and the student {students} times sample at "
            f"most {most:,}"
        )
