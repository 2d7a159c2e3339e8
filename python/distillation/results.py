"""What came out of a run: each model on each set of held-out prompts, in ``results.json`` and a table at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from .evaluation import Evaluation
from .forward import inside_forward
from .options import Options
from .processes import gathered
from .report import say, table
from .run_folder import RunFolder
from .scenarios import Scenario
from .success import pass_rates
from .trainer import OnPolicyTrainer

PASS_AT = (1, 8)
AGREEMENT = (
    ("H_s | H_t>tau", "student_entropy_uncertain", ".3f"),
    ("fwd KL | H_t>tau", "forward_kl_uncertain", ".3f"),
    ("fwd KL | else", "forward_kl_certain", ".3f"),
)


class Results:
    """``results.json``: each model on each set once, so that a resumed run goes on where it stopped."""

    def __init__(self, options: Options, scenario: Scenario, folder: RunFolder) -> None:
        self.evaluation = Evaluation(options, scenario)
        self.sets = scenario.held_out
        self.folder = folder
        self.samples = options.run.eval_samples
        self.tau = options.loss.tau
        begun: dict[str, Any] = {
            "task": scenario.task,
            "sets": {name: len(prompts) for name, prompts in self.sets.items()},
            "samples": self.samples,
            "tau": self.tau,
            "models": [],
        }
        self.content = gathered(folder.read("results.json") or begun)[0]  # as the first process has it

    def add(self, name: str, load: Callable[[], PreTrainedModel]) -> None:
        """Evaluates the model called ``name`` on the sets on which that was not done."""
        done = {row["set"] for row in self.content["models"] if row["name"] == name}
        model = load() if done != set(self.sets) else None
        for one in self.sets:
            if model is not None and one not in done:
                found = self.evaluation.figures(one, model, name)
                self.content["models"].append({"name": name, "set": one, **found})
                self.folder.write("results.json", self.content)

    def during(self, run: str, trainer: OnPolicyTrainer) -> dict[str, float]:
        """Evaluates the student between two of its steps; a line per set in ``evaluations.jsonl``."""
        step, shared = trainer.state.global_step, trainer.shares_parameters
        told: dict[str, float] = {}
        within = {"within": partial(inside_forward, trainer.model_wrapped, trainer.student)} if shared else {}
        for one in self.sets:
            label = f"{run}, step {step}"
            found = self.evaluation.figures(one, trainer.student, label, synced=shared, **within)
            if self.folder.writes:
                self.folder.log("evaluations.jsonl", {"run": run, "step": step, "set": one, **found})
            numbers = self.numbers(found)
            told |= {f"eval_{one}_{key}": value for key, value in numbers.items() if not math.isnan(value)}
            rates = [f"pass@{k} {numbers[f'pass@{k}']:.1%}" for k in PASS_AT if f"pass@{k}" in numbers]
            kl = [f"forward KL where H_t > tau {numbers['forward_kl_uncertain']:.3f}"]
            say(f"  {label}, {one}: {', '.join(rates + kl)}")
        return told

    def numbers(self, found: dict[str, Any]) -> dict[str, float]:
        """pass@k beside the agreement."""
        numbers = {key: math.nan if value is None else value for key, value in found["agreement"].items()}
        known = [k for k in PASS_AT if found["correct"] is not None and k <= self.samples]
        return numbers | {f"pass@{k}": float(pass_rates(found["correct"], k).mean()) for k in known}

    def report(self) -> None:
        """A table for each set, and what is needed to judge its noise."""
        for one, prompts in self.sets.items():
            rows = [(row["name"], self.numbers(row)) for row in self.content["models"] if row["set"] == one]
            reference = rows[0][1]
            columns = [(f"pass@{k}", f"pass@{k}", ".1%") for k in PASS_AT if f"pass@{k}" in reference]
            say(f"\n{one} prompts: {len(prompts)}, samples per prompt: {self.samples}, one training run per row\n")
            say(table(rows, [*columns, *AGREEMENT]))
            say(
                f"\nH_s and forward KL: means in nats over the {reference['tokens']:.0f} tokens of the teacher's own "
                f"samples; {reference['uncertain_fraction']:.0%} have H_t > tau = {self.tau:g}."
            )
            if columns:
                say("pass@k: unbiased estimate from each model's own samples.")
