"""On-policy distillation of one causal language model into another, with the entropy-aware loss of eopd_kernels.

    python python/distill.py                                                       # a demonstration, CPU, offline
    python python/distill.py --teacher A --student B --prompts prompts.jsonl       # two models of one's own
    torchrun --nproc-per-node 8 python/distill.py --config configs/math-qwen3-1.7b.yaml

The student writes completions, the teacher says on every token what it would have expected, and the loss compares the
two from hidden states. README.md, beside this file, says what is logged and what each number means.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that spin while they wait for each other make the small products of the demonstration
# more than ten times slower as soon as another program wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import transformers
from distillation.answering import Answering, Given, SampledAnswers
from distillation.checkpoints import last_checkpoint
from distillation.command_line import parse_options
from distillation.demonstration import build_models
from distillation.errors import Interrupted, RunError, UsageError
from distillation.evaluation import agreement, correctness
from distillation.options import Options
from distillation.page import write_page
from distillation.plan import say_plan
from distillation.report import say, shown, step_header, step_line, table
from distillation.rollouts import Completion, Rollouts, sample, text_of
from distillation.run_folder import RunFolder
from distillation.scenarios import Scenario, load_scenario
from distillation.stream import PromptStream
from distillation.success import pass_rates
from distillation.trainer import Bar, OnPolicyTrainer
from distillation.vllm_answering import SampledByVLLM, imported
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerState

PASS_AT = (1, 8)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = None
    try:
        options = parse_options(arguments)
        path = Path(options.training.output_dir or "")
        if not options.given["output_dir"]:
            path = Path("runs") / time.strftime("distill-%Y%m%d-%H%M%S")
        folder = RunFolder(path, resumed="--resume" in arguments, writes=options.training.process_index == 0)
        run(options, folder)
    except RunError as error:
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (Interrupted, KeyboardInterrupt):
        begun = folder and folder.read("config.json")
        kept = f"; `distill.py --resume {folder.path}` goes on with it" if folder and begun else ""
        print(f"\ndistill.py: interrupted{kept}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized() and "vllm" not in sys.modules:  # which ends the groups that it has begun, and others
            dist.destroy_process_group()
    return 0


def run(options: Options, folder: RunFolder) -> None:
    """The whole story: models, a first look, one distillation per objective from the same start, a table."""
    if options.run.plan is not None:
        return say_plan(options)
    started = time.perf_counter()
    device = options.training.device
    names = tuple(options.loss.objectives)
    if options.rollouts.rollout_engine == "vllm":
        imported()
    if options.demo and folder.writes:
        begin(options, names, folder)
        build_models(options, folder, device)
    wait(options)
    scenario = load_scenario(options, folder, device)
    if folder.writes:  # nothing is before everything has been checked
        begin(options, names, folder)
    results = Results(options, scenario, folder)

    results.add("teacher", lambda: scenario.teacher)
    results.add("student at start", scenario.load_student)
    for name in names:
        trained = folder.path / f"student-{name}"
        if not trained.exists():
            train(options, scenario, name, folder)
            gc.collect()  # the trainer is in a circle, and its student and optimizer would stay for the evaluation
        results.add(name, lambda trained=trained: scenario.load_student(str(trained)))

    wait(options)
    if folder.writes:
        report(options, scenario, results.rows())
        say(f"\n{write_page(folder.path)} shows the run")
    say(f"{time.perf_counter() - started:.0f} s in all; config, metrics, results and models are in {folder.path}")


def begin(options: Options, names: Sequence[str], folder: RunFolder) -> None:
    """Writes what is to be run; of a run that has been and is to have more steps, forgets that it was finished."""
    before, results = folder.read("config.json"), folder.read("results.json")
    if before is not None and before["max_steps"] == options.training.max_steps:
        return
    for name in names:
        if (done := steps_done(folder, name)) > options.training.max_steps > 0:
            raise UsageError("--max-steps", f"the run has {done} steps already")
    if results is not None:
        results["models"] = [row for row in results["models"] if row["name"] not in names]
        folder.write("results.json", results)
    for name in names:
        shutil.rmtree(folder.path / f"student-{name}", ignore_errors=True)
    echoed = {"device": options.training.device, "processes": options.training.world_size, "versions": versions()}
    folder.write("config.json", {**options.given, **echoed})


def steps_done(folder: RunFolder, name: str) -> int:
    """Of the last checkpoint of an objective."""
    checkpoint = last_checkpoint(folder.checkpoints(name))
    return TrainerState.load_from_json(f"{checkpoint}/trainer_state.json").global_step if checkpoint else 0


def train(options: Options, scenario: Scenario, name: str, folder: RunFolder) -> None:
    """One distillation with the objective called ``name``, from its last checkpoint if it has one."""
    args = copy.deepcopy(options.training)
    args.output_dir = str(folder.checkpoints(name))
    if args.max_steps < 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(scenario.training) / args.prompts_per_step)
    checkpoint = last_checkpoint(folder.checkpoints(name))
    done = steps_done(folder, name)
    folder.forget_after(name, done)

    def on_step(metrics: dict[str, Any], histograms: dict[str, Any], completions: list[Completion]) -> None:
        step = metrics["step"]
        folder.log("metrics.jsonl", {"run": name, **metrics})
        if step % options.run.histogram_steps == 0 or step in (1, args.max_steps):
            folder.log("histograms.jsonl", {"run": name, "step": step, **histograms})
        if shown(step, args.max_steps):
            say(step_line(metrics))
            for completion in completions[: options.run.logged_completions]:
                folder.log("completions.jsonl", {"run": name, "step": step, **readable(scenario, completion)})

    trainer = OnPolicyTrainer(
        scenario.load_student(),
        scenario.teacher,
        scenario.tokenizer,
        args,
        PromptStream(scenario.training, args.max_steps * args.prompts_per_step, args.seed),
        objective=options.loss.objectives[name],
        tau=options.loss.tau,
        vocab_size=scenario.vocab_size,
        rollout_prompts=options.rollouts.rollout_prompts,
        on_step=on_step,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if sys.stderr.isatty():
        trainer.add_callback(Bar())
    trainer.answer = answering(trainer, scenario, options)
    say(f"\ndistilling with {name}: {args.max_steps} steps of {args.prompts_per_step} completions")
    if done:
        say(f"from step {done}, as {checkpoint} has it")
    say(step_header())
    with stopping(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop_requested and trainer.state.global_step < args.max_steps:
        raise Interrupted
    folder.save_model(f"student-{name}", trainer.save_student)
    wait(options)


def answering(trainer: OnPolicyTrainer, scenario: Scenario, options: Options) -> Answering:
    """Where completions come from."""
    rollouts = options.rollouts
    if options.prompts.completion_column is not None:
        return Given(rollouts.max_new_tokens)
    if trainer.shares_parameters and rollouts.off_policy_fraction not in (0.0, 1.0):
        raise UsageError(
            "--off-policy-fraction",
            f"{rollouts.off_policy_fraction:g} would have the processes, which share the student's parameters, sample "
            "from it unequally often; 0 and 1 are possible",
        )
    models = (trainer.student, scenario.teacher, scenario.tokenizer)
    sampling: dict[str, Any] = {
        "seed": options.training.seed,
        "max_new_tokens": rollouts.max_new_tokens,
        "vocab_size": scenario.vocab_size,
        "batch_size": rollouts.generation_batch_size,
        "off_policy_fraction": rollouts.off_policy_fraction,
        "synced": trainer.shares_parameters,
        "autocast": trainer.accelerator.autocast,
    }
    if rollouts.rollout_engine == "generate":
        return SampledAnswers(*models, **sampling)
    if trainer.is_deepspeed_enabled and trainer.shares_parameters:
        raise UsageError("--rollout-engine", "vllm is handed whole parameters, which DeepSpeed ZeRO-3 has not")
    longest = max(len(prompt.ids) for prompt in scenario.training) + rollouts.max_new_tokens
    sampling |= {"start": scenario.start, "eos_ids": scenario.eos_ids, "longest": longest}
    return SampledByVLLM(*models, **sampling, memory=rollouts.vllm_memory)


@contextmanager
def stopping(trainer: OnPolicyTrainer) -> Iterator[None]:
    """While it is entered, Ctrl-C and SIGTERM end training after the step, with a checkpoint; a second one at once."""

    def stop(number: int, frame: Any) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def readable(scenario: Scenario, completion: Completion) -> dict[str, Any]:
    """A completion as it is logged."""
    text = text_of(completion, scenario.tokenizer)
    prompt = next((prompt for prompt in scenario.training if prompt.ids == completion.prompt), None)
    check = scenario.check(prompt) if prompt is not None else None
    correct = None if check is None else completion.ended and check(text)
    prompt_text = scenario.tokenizer.decode(completion.prompt, skip_special_tokens=False)
    said = {"prompt": prompt_text, "completion": text, "writer": completion.writer}
    return {**said, "correct": correct, "ended": completion.ended}


class Results:
    """``results.json``: each model once, so that a resumed run goes on where it stopped."""

    def __init__(self, options: Options, scenario: Scenario, folder: RunFolder) -> None:
        self.options = options
        self.scenario = scenario
        self.folder = folder
        self.reference: list[Rollouts] | None = None
        self.content = folder.read("results.json") or {
            "task": scenario.task,
            "prompts": len(scenario.held_out),
            "samples": options.run.eval_samples,
            "tau": options.loss.tau,
            "models": [],
        }

    def add(self, name: str, load: Any) -> None:
        """Evaluates the model called ``name`` on the main process, unless that was done."""
        if self.folder.writes and all(row["name"] != name for row in self.content["models"]):
            self.content["models"].append({"name": name, **self.evaluated(load())})
            self.folder.write("results.json", self.content)
        wait(self.options)

    def sampled(self, model: PreTrainedModel) -> list[Rollouts]:
        """Completions of held-out prompts, by chance that is the same for every model."""
        options, scenario, size = self.options, self.scenario, self.options.run.evaluation_batch_size
        torch.manual_seed(options.training.seed)
        prompts = [prompt.ids for prompt in scenario.held_out for _ in range(options.run.eval_samples)]
        sampling: dict[str, Any] = {"top_p": options.run.eval_top_p, "vocab_size": scenario.vocab_size}
        sampling["max_new_tokens"] = options.run.eval_max_new_tokens or options.rollouts.max_new_tokens
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [sample(model, scenario.tokenizer, batch, **sampling) for batch in batches]

    def evaluated(self, model: PreTrainedModel) -> dict[str, Any]:
        """Right answers where they can be checked, and agreement with the teacher on its own answers."""
        scenario, tau = self.scenario, self.options.loss.tau
        if self.reference is None:
            self.reference = self.sampled(scenario.teacher)
        found = agreement(model, scenario.teacher, self.reference, tau=tau, vocab_size=scenario.vocab_size)
        checks = [check for prompt in scenario.held_out if (check := scenario.check(prompt)) is not None]
        correct = None
        if len(checks) == len(scenario.held_out):
            own = self.reference if model is scenario.teacher else self.sampled(model)
            correct = correctness(own, scenario.tokenizer, scenario.eos_ids, checks)
        return {"correct": correct, "agreement": found}

    def rows(self) -> list[tuple[str, dict[str, float]]]:
        """The table's: pass@k beside the agreement."""
        rows = []
        for model in self.content["models"]:
            numbers = {key: math.nan if value is None else value for key, value in model["agreement"].items()}
            for k in PASS_AT:
                if model["correct"] is not None and k <= self.options.run.eval_samples:
                    numbers[f"pass@{k}"] = float(pass_rates(model["correct"], k).mean())
            rows.append((model["name"], numbers))
        return rows


def report(options: Options, scenario: Scenario, results: list[tuple[str, dict[str, float]]]) -> None:
    """The table, and what is needed to judge its noise."""
    reference = results[0][1]
    columns = [(f"pass@{k}", f"pass@{k}", ".1%") for k in PASS_AT if f"pass@{k}" in reference]
    checked = bool(columns)
    columns += [
        ("H_s | H_t>tau", "student_entropy_uncertain", ".3f"),
        ("fwd KL | H_t>tau", "forward_kl_uncertain", ".3f"),
        ("fwd KL | else", "forward_kl_certain", ".3f"),
    ]
    prompts = len(scenario.held_out)
    say(f"\nheld-out prompts: {prompts}, samples per prompt: {options.run.eval_samples}, one training run per row\n")
    say(table(results, columns))
    say(
        f"\nH_s and forward KL: means in nats over the {reference['tokens']:.0f} tokens of the teacher's own samples; "
        f"{reference['uncertain_fraction']:.0%} have H_t > tau = {options.loss.tau:g}."
    )
    if checked:
        say("pass@k: unbiased estimate from each model's own samples.")


def wait(options: Options) -> None:
    """Until every process is here."""
    if options.training.world_size > 1:
        dist.barrier()


def versions() -> dict[str, str]:
    """Of everything that the numbers of a run depend on."""
    packages = ("eopd-kernels", "torch", "transformers", "accelerate", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


if __name__ == "__main__":
    sys.exit(main())
