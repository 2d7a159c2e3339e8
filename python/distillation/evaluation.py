"""What is measured on held-out prompts: right answers, and what a model does where the teacher is uncertain.

Each sample of each prompt has random numbers of its own, the same for every model. Batches of samples are dealt to the
processes, and what is found is put together in the batches' order: it is what one process finds, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import EntropyAwareKLOutput, Objective, TopK

from .answering import SampledAnswers
from .forward import inside_forward
from .metrics import StepTotals
from .options import Options
from .processes import gathered, wait
from .report import say, table
from .rollouts import Completion, Rollouts, collate, text_of
from .run_folder import RunFolder
from .scenarios import Scenario
from .served_teacher import ServedTeacher
from .stream import Draw
from .success import pass_rates
from .teachers import Teacher, Teachers, by_teacher
from .trainer import OnPolicyTrainer
from .training import score

PASS_AT = (1, 8)
WORTH_SAYING = 60.0  # seconds
Check = Callable[[str], bool]


def right(completions: Sequence[Completion], tokenizer: Tokenizer, checks: Sequence[Check]) -> list[int]:
    """Whether each completion is right by its check, which sees the text before the end of the sequence, 0 or 1.

    An answer that never ends is wrong. :mod:`distillation.success` makes Avg@k, Pass@k and their intervals of them.
    """
    return [int(one.ended and check(text_of(one, tokenizer))) for one, check in zip(completions, checks, strict=True)]


def compared(teacher: Teacher) -> Objective:
    """Forward KL. Of a served teacher with one class for what it does not list: entropies and KL are lower bounds."""
    teachers = teacher.models if isinstance(teacher, Teachers) else [teacher]
    if any(isinstance(one, ServedTeacher) for one in teachers):
        return Objective(reverse="none", forward=TopK(teacher="raw", tail=True), gate="always")
    return Objective.forward_kl()


def agreement(totals: StepTotals, sums: Tensor) -> dict[str, float | None]:
    """Entropies and forward KL (nats) of ``sums``, split at the tau of ``totals``. A mean over no tokens is None."""
    found = totals.metrics(sums)
    return {
        "tokens": found["tokens"],
        "uncertain_fraction": sums[totals.places["tokens_open"]].item() / (found["tokens"] or 1),
        "teacher_entropy_uncertain": found["teacher_entropy_open"],
        "student_entropy_uncertain": found["student_entropy_open"],
        "forward_kl_uncertain": found["forward_kl_open"],
        "forward_kl_certain": found["forward_kl_closed"],
    }


class Results:
    """``results.json``: each model on each set of prompts once, so that a resumed run goes on where it stopped.

    Every process takes part. The teacher is sampled once: what it wrote is kept, for all models.
    """

    def __init__(self, options: Options, scenario: Scenario, folder: RunFolder) -> None:
        self.options = options
        self.scenario = scenario
        self.folder = folder
        self.samples = options.run.eval_samples
        self.longest = options.run.eval_max_new_tokens or options.rollouts.max_new_tokens
        self.totals = StepTotals(options.loss.tau, scenario.vocab_size, scenario.device)
        self.reference: dict[tuple[str, int], list[Completion]] = {}
        begun: dict[str, Any] = {"task": scenario.task, "samples": self.samples, "tau": options.loss.tau, "models": []}
        begun["sets"] = {name: len(prompts) for name, prompts in scenario.held_out.items()}
        self.content = gathered(folder.read("results.json") or begun)[0]  # as the first process has it

    def add(self, name: str, load: Callable[[], Teacher]) -> None:
        """Evaluates the model called ``name`` on the sets on which that was not done."""
        done = {row["set"] for row in self.content["models"] if row["name"] == name}
        model = load() if done != set(self.scenario.held_out) else None
        for one in self.scenario.held_out:
            if model is not None and one not in done:
                self.content["models"].append({"name": name, "set": one, **self.evaluated(one, model, name)})
                self.folder.write("results.json", self.content)

    def during(self, run: str, trainer: OnPolicyTrainer) -> dict[str, float]:
        """Evaluates the student between two steps: a line of ``evaluations.jsonl``."""
        found: dict[str, float] = {}
        for one in self.scenario.held_out:
            numbers = self.numbers(self.evaluated(one, trainer.student, run, trainer))
            found |= {f"{one}/{name}": value for name, value in numbers.items() if not math.isnan(value)}
        if self.folder.writes:
            self.folder.log("evaluations.jsonl", {"run": run, "step": trainer.state.global_step, **found})
        told = [f"{name} {value:.3f}" for name, value in found.items() if name.endswith(("@1", "@8", "kl_uncertain"))]
        say(f"  evaluated: {', '.join(told)}")
        return found

    def sampled(self, model: Teacher, name: str, draws: list[Draw], synced: bool) -> list[Completion]:
        """A completion per draw of a set."""
        scenario, run = self.scenario, self.options.run
        sampling: dict[str, Any] = {"max_new_tokens": self.longest, "top_p": run.eval_top_p}
        sampling |= {"seed": f"{self.options.training.seed}/{name}", "vocab_size": scenario.vocab_size}

        def answer(one: Any, its: list[Draw]) -> list[Completion]:
            if isinstance(one, ServedTeacher):
                return one.sample(its, **sampling)
            return SampledAnswers(one, one, scenario.tokenizer, **sampling, synced=synced)(its)

        return by_teacher(model, draws, answer)

    def checks(self, name: str) -> list[Check]:
        """One per prompt of a set; none at all where some prompt has none."""
        found = [self.scenario.check(prompt) for prompt in self.scenario.held_out[name]]
        return [] if None in found else [check for check in found if check is not None]

    @torch.no_grad()
    def evaluated(
        self, name: str, model: Teacher, label: str, trainer: OnPolicyTrainer | None = None
    ) -> dict[str, Any]:
        """``correct``, 0 or 1 ``[prompts][samples]`` or None where that cannot be said, and ``agreement``, of one set.

        With ``trainer`` the model is its student, whose parameters the processes may share. What a served teacher, or
        several, have in common with themselves is not seen here.
        """
        scenario, checks, size = self.scenario, self.checks(name), self.options.run.evaluation_batch_size
        objective = compared(scenario.teacher)
        shared = trainer is not None and trainer.shares_parameters
        prompts = [prompt for prompt in scenario.held_out[name] for _ in range(self.samples)]
        draws = list(map(Draw, range(len(prompts)), prompts))
        batches = [draws[start : start + size] for start in range(0, len(draws), size)]
        rank, ranks = self.options.training.process_index, self.options.training.world_size
        mine = list(range(rank, len(batches), ranks))
        if shared:  # all run it equally often
            mine += [0] * (math.ceil(len(batches) / ranks) - len(mine))
        own: dict[int, tuple[list[float], list[int]]] = {}
        training, started = model.training, time.perf_counter()
        model.eval()
        for at in tqdm(mine, desc=f"{label}: {name}", leave=False, disable=None if rank == 0 else True):
            if (name, at) not in self.reference:
                self.reference[name, at] = self.sampled(scenario.teacher, name, batches[at], False)
            if shared:
                wait()  # patiently for a teacher that is slower elsewhere: the student's collectives are not
            answers = self.reference[name, at]
            rollouts = collate(answers, scenario.tokenizer.pad_token_id, scenario.device)

            self.totals.sums.zero_()
            if not isinstance(model, ServedTeacher | Teachers):

                def scored(student: PreTrainedModel = model, rollouts: Rollouts = rollouts) -> EntropyAwareKLOutput:
                    return score(student, scenario.teacher, rollouts, objective, vocab_size=scenario.vocab_size)

                seen = inside_forward(trainer.model_wrapped, model, scored) if trainer and shared else scored()
                self.totals.add_tokens(seen, seen.loss, rollouts.completion_mask)
            if checks and model is not scenario.teacher:
                answers = self.sampled(model, name, batches[at], shared)
            its = [checks[draw.number // self.samples] for draw in batches[at]] if checks else []
            own[at] = self.totals.sums.tolist(), right(answers[: len(its)], scenario.tokenizer, its)
            at_most = (time.perf_counter() - started) * len(mine) * self.longest / max(len(one.ids) for one in answers)
            if len(own) == 1 and at_most >= WORTH_SAYING:
                say(f"  {label}, {name}: at most {at_most / 60:.0f} min, by the speed of the first batch")
        model.train(training)
        every = {at: found for share in gathered(own) for at, found in share.items()}
        sums, correct = zip(*(every[at] for at in range(len(batches))), strict=True)
        found = agreement(self.totals, self.totals.sums.new_tensor(sums).sum(0))
        return {
            "correct": np.concatenate(correct).reshape(-1, self.samples).tolist() if checks else None,
            "agreement": {} if isinstance(model, ServedTeacher | Teachers) else found,
        }

    def cost(self, students: int) -> str:
        """What is sampled at most by the teacher and, so many times, by a student."""
        sets = {name: len(prompts) for name, prompts in self.scenario.held_out.items()}
        each = self.samples * self.longest
        most = sum(each * count * (1 + students * bool(self.checks(name))) for name, count in sets.items())
        parts = " + ".join(f"{count} ({name})" for name, count in sets.items())
        return (
            f"evaluation: {parts} prompts × {self.samples} samples × {self.longest} tokens are at most "
            f"{each * sum(sets.values()):,};\nthe teacher once and a student {students} times sample at most {most:,}"
        )

    def numbers(self, found: dict[str, Any]) -> dict[str, float]:
        """pass@k beside the agreement."""
        numbers = {key: math.nan if value is None else value for key, value in found["agreement"].items()}
        ks = [k for k in PASS_AT if found["correct"] is not None and k <= self.samples]
        return numbers | {f"pass@{k}": float(pass_rates(found["correct"], k).mean()) for k in ks}

    def report(self) -> None:
        """A table for each set, and what is needed to judge its noise."""
        for one, count in self.content["sets"].items():
            rows = [(row["name"], self.numbers(row)) for row in self.content["models"] if row["set"] == one]
            reference = rows[-1][1]
            columns = [(f"pass@{k}", f"pass@{k}", ".1%") for k in PASS_AT if f"pass@{k}" in reference]
            checked = bool(columns)
            columns += [
                ("H_s | H_t>tau", "student_entropy_uncertain", ".3f"),
                ("fwd KL | H_t>tau", "forward_kl_uncertain", ".3f"),
                ("fwd KL | else", "forward_kl_certain", ".3f"),
            ]
            say(f"\n{one} prompts: {count}, samples per prompt: {self.samples}, one training run per row\n")
            say(table(rows, columns))
            say(
                f"\nH_s and forward KL: means in nats over the {reference['tokens']:.0f} tokens of the teacher's own "
                f"samples; {reference['uncertain_fraction']:.0%} have H_t > tau = {self.options.loss.tau:g}."
            )
            if checked:
                say("pass@k: unbiased estimate from each model's own samples.")
