"""On-policy distillation of one causal language model into another, with the entropy-aware loss of eopd_kernels.

    python python/distill.py                                                       # a demonstration, CPU, offline
    python python/distill.py --teacher A --student B --prompts prompts.jsonl       # two models of one's own

The student writes completions, the teacher says on every token what it would have expected, and the loss compares the
two from hidden states. README.md, beside this file, says what is logged and what each number means.
"""

from __future__ import annotations

import copy
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

# Before torch is loaded: threads that spin while they wait for each other make the small products of the demonstration
# more than ten times slower as soon as another program wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from distillation.errors import RunError, UsageError
from distillation.evaluation import agreement, sample_in_batches, success_rates
from distillation.options import Options, parse_options
from distillation.prompts import shuffled_batches
from distillation.report import (
    RunFolder,
    peak_memory_mib,
    progress,
    say,
    shown,
    step_header,
    step_line,
    table,
)
from distillation.rollouts import Rollouts, sample
from distillation.scenarios import Scenario, demonstration, own_models, pick_device
from distillation.training import distill
from transformers import PreTrainedModel

from eopd_kernels import EntropyGate, Objective

PASS_AT = (1, 8)
EVALUATION_BATCH = 400  # sequences of the demonstration sampled at a time; own models use --micro-batch-size


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = None
    try:
        options = parse_options(arguments)
        device = pick_device(options)
        folder = RunFolder(options.output or Path("runs") / time.strftime("distill-%Y%m%d-%H%M%S"))
        run(options, device, folder)
    except RunError as error:
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        kept = f"; what was logged so far is in {folder.path}" if folder else ""
        print(f"\ndistill.py: interrupted{kept}", file=sys.stderr)
        return 130
    return 0


def run(options: Options, device: torch.device, folder: RunFolder) -> None:
    """The whole story: models, a first look, one distillation per objective from the same start, a table."""
    started = time.perf_counter()
    scenario = demonstration(options, device) if options.demo else own_models(options, device)
    folder.write("config.json", {**asdict(options), "device": device, "versions": versions()})
    if options.demo:
        folder.save_model("teacher", scenario.teacher, scenario.tokenizer)
        folder.save_model("student-start", scenario.student, scenario.tokenizer)
    names = ("reverse-kl", "entropy-aware") if options.objective == "both" else (options.objective,)
    start = copy.deepcopy(scenario.student.state_dict()) if len(names) > 1 else None

    torch.manual_seed(options.seed)
    reference = teacher_samples(options, scenario)
    results = [("teacher", evaluate(options, scenario, scenario.teacher, reference))]
    results.append(("student at start", evaluate(options, scenario, scenario.student, reference)))
    for name in names:
        if start is not None:
            scenario.student.load_state_dict(start)
        train(options, scenario, name, folder)
        folder.save_model(f"student-{name}", scenario.student, scenario.tokenizer)
        results.append((name, evaluate(options, scenario, scenario.student, reference)))

    folder.write("results.json", dict(results))
    report(options, scenario, results)
    say(f"\n{time.perf_counter() - started:.0f} s in all; config, metrics, results and models are in {folder.path}")


def train(options: Options, scenario: Scenario, name: str, folder: RunFolder) -> None:
    """One distillation with the objective called ``name``; every step goes to the run folder, some to the terminal."""
    torch.manual_seed(options.seed)
    batches = shuffled_batches(scenario.training_prompts, options.batch_size, options.seed)

    def draw_rollouts() -> Rollouts:
        return sample(
            scenario.student,
            scenario.tokenizer,
            next(batches),
            max_new_tokens=options.max_new_tokens,
            vocab_size=scenario.vocab_size,
        )

    steps = distill(
        scenario.student,
        scenario.teacher,
        draw_rollouts,
        objective_called(name, options),
        steps=options.steps,
        micro_batch_size=options.micro_batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        vocab_size=scenario.vocab_size,
    )
    say(f"\ndistilling with {name}: {options.steps} steps of {options.batch_size} completions")
    say(step_header())
    for metrics in progress(steps, options.steps, name):
        metrics["peak_memory_mib"] = peak_memory_mib(scenario.student.device)
        folder.log({"objective": name, **metrics})
        if shown(int(metrics["step"]), options.steps):
            say(step_line(metrics))


def objective_called(name: str, options: Options) -> Objective:
    """The objective of the command line's ``name`` and loss options."""
    if name == "reverse-kl":
        return Objective.reverse_kl(temperature=options.temperature)
    if name == "forward-kl":
        return Objective.forward_kl(temperature=options.temperature)
    return Objective(
        gate=EntropyGate(options.tau), alpha=options.alpha, combine=options.combine, temperature=options.temperature
    )


def teacher_samples(options: Options, scenario: Scenario) -> list[Rollouts]:
    """The teacher's own answers to the held-out prompts: what the models' distributions are compared on."""
    repeated = [prompt for prompt in scenario.held_out_prompts for _ in range(options.eval_samples)]
    return sample_in_batches(
        scenario.teacher,
        scenario.tokenizer,
        repeated,
        batch_size=EVALUATION_BATCH if options.demo else options.micro_batch_size,
        max_new_tokens=options.max_new_tokens,
        vocab_size=scenario.vocab_size,
    )


def evaluate(
    options: Options, scenario: Scenario, model: PreTrainedModel, reference: list[Rollouts]
) -> dict[str, float]:
    """Agreement with the teacher on ``reference`` and, where answers can be checked, how often they are right."""
    numbers = agreement(model, scenario.teacher, reference, tau=options.tau, vocab_size=scenario.vocab_size)
    if scenario.checks is None:
        return numbers
    torch.manual_seed(options.seed)
    rates = success_rates(
        model,
        scenario.tokenizer,
        scenario.held_out_prompts,
        scenario.checks,
        samples=options.eval_samples,
        ks=PASS_AT,
        batch_size=EVALUATION_BATCH,
        max_new_tokens=options.max_new_tokens,
    )
    return {**rates, **numbers}


def report(options: Options, scenario: Scenario, results: list[tuple[str, dict[str, float]]]) -> None:
    """The table, and what is needed to judge its noise."""
    columns = [(f"pass@{k}", f"pass@{k}", ".1%") for k in PASS_AT] if scenario.checks is not None else []
    columns += [
        ("H_s | H_t>tau", "student_entropy_uncertain", ".3f"),
        ("fwd KL | H_t>tau", "forward_kl_uncertain", ".3f"),
        ("fwd KL | else", "forward_kl_certain", ".3f"),
    ]
    reference = results[0][1]
    prompts = len(scenario.held_out_prompts)
    say(f"\nheld-out prompts: {prompts}, samples per prompt: {options.eval_samples}, one training run per row\n")
    say(table(results, columns))
    say(
        f"\nH_s and forward KL: means in nats over the {reference['tokens']:.0f} tokens of the teacher's own samples; "
        f"{reference['uncertain_fraction']:.0%} have H_t > tau = {options.tau:g}."
    )
    if scenario.checks is not None:
        say("pass@k: unbiased estimate from each model's own samples.")


def versions() -> dict[str, str]:
    """Of everything that the numbers of a run depend on."""
    packages = ("eopd-kernels", "torch", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


if __name__ == "__main__":
    sys.exit(main())
