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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that spin while they wait for each other make the small products of the demonstration
# more than ten times slower as soon as another program wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch.distributed as dist
import transformers
from distillation.answering import Answering, Given, SampledAnswers
from distillation.checkpoints import last_checkpoint
from distillation.command_line import parse_options
from distillation.demonstration import build_models
from distillation.errors import Interrupted, RunError, UsageError
from distillation.evaluation import Results
from distillation.options import Options
from distillation.page import write_page
from distillation.plan import say_plan
from distillation.processes import wait
from distillation.report import say, shown, step_header, step_line
from distillation.rollouts import Completion, pieces, text_of
from distillation.run_folder import RunFolder
from distillation.scenarios import Scenario, load_scenario
from distillation.stream import PromptStream
from distillation.trainer import Bar, OnPolicyTrainer
from distillation.vllm_answering import SampledByVLLM, imported
from transformers import PrinterCallback, ProgressCallback, TrainerState


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
    wait()
    scenario = load_scenario(options, folder, device)
    if folder.writes:  # nothing is before everything has been checked
        begin(options, names, folder)
    results = Results(options, scenario, folder)
    in_training = (steps_of(options, scenario) - 1) // (options.training.eval_steps or math.inf)
    say(results.cost(1 + len(names) * (1 + int(in_training))))

    results.add("teacher", lambda: scenario.teacher)
    results.add("student at start", scenario.load_student)
    for name in names:
        trained = folder.path / f"student-{name}"
        if not trained.exists():
            train(options, scenario, name, folder, results)
            gc.collect()  # the trainer is in a circle, and its student and optimizer would stay for the evaluation
        results.add(name, partial(scenario.load_student, str(trained)))

    wait()
    if folder.writes:
        results.report()
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


def steps_of(options: Options, scenario: Scenario) -> int:
    """Of each distillation."""
    args = options.training
    epochs = math.ceil(args.num_train_epochs * len(scenario.training) / args.prompts_per_step)
    return args.max_steps if args.max_steps > 0 else epochs


def train(options: Options, scenario: Scenario, name: str, folder: RunFolder, results: Results) -> None:
    """One distillation with the objective called ``name``, from its last checkpoint if it has one."""
    args = copy.deepcopy(options.training)
    args.output_dir = str(folder.checkpoints(name))
    args.max_steps = steps_of(options, scenario)
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
            for place, completion in enumerate(completions[: options.run.logged_completions]):
                said = {**readable(scenario, completion), "figures": trainer.figures(place)}
                folder.log("completions.jsonl", {"run": name, "step": step, **said})

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
    trainer.evaluation = partial(results.during, name)
    say(f"\ndistilling with {name}: {args.max_steps} steps of {args.prompts_per_step} completions")
    if done:
        say(f"from step {done}, as {checkpoint} has it")
    say(step_header())
    with stopping(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop_requested and trainer.state.global_step < args.max_steps:
        raise Interrupted
    folder.save_model(f"student-{name}", trainer.save_student)
    wait()


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
    models: Any = (trainer.student, scenario.teacher, scenario.tokenizer)  # a served teacher answers no prompts
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
    return {**said, "correct": correct, "ended": completion.ended, "tokens": pieces(completion.ids, scenario.tokenizer)}


def versions() -> dict[str, str]:
    """Of everything that the numbers of a run depend on."""
    packages = ("eopd-kernels", "torch", "transformers", "accelerate", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


if __name__ == "__main__":
    sys.exit(main())
