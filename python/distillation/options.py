"""The command line: what can be chosen, the defaults of the two modes, and the checks that need no model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from .errors import UsageError

DTYPES = ("float32", "bfloat16", "auto")
OBJECTIVES = ("entropy-aware", "reverse-kl", "forward-kl", "both")

# What differs between the demonstration and a run on one's own models.
DEMO = {
    "objective": "both",
    "steps": 120,
    "batch_size": 128,
    "micro_batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 5,
    "max_new_tokens": 14,
    "eval_prompts": 200,
    "eval_samples": 16,
}
OWN = {
    "objective": "entropy-aware",
    "steps": 100,
    "batch_size": 32,
    "micro_batch_size": 4,
    "learning_rate": 1e-5,
    "warmup_steps": 10,
    "max_new_tokens": 256,
    "eval_prompts": 32,
    "eval_samples": 1,
}


@dataclass
class Options:
    """A parsed and checked command line; README.md says what each option means."""

    teacher: str | None
    student: str | None
    prompts: Path | None
    objective: str
    tau: float
    alpha: float
    combine: Literal["add", "switch"]
    temperature: float
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    max_new_tokens: int
    eval_prompts: int
    eval_samples: int
    torch_dtype: str
    student_dtype: str
    device: str
    seed: int
    output: Path | None
    teacher_steps: int
    student_steps: int

    @property
    def demo(self) -> bool:
        return self.teacher is None


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def number(kind: Callable[[str], Any], *, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite int or float of at least ``least`` and above ``above``."""
    bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or value <= above:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}{bound}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="distill.py",
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description=(
            "On-policy distillation of one causal language model into another.\n\n"
            "Without arguments: a demonstration on two CPU cores, offline, in a few minutes. It trains a\n"
            "small teacher on a task of its own, distils a smaller student twice from the same start, and\n"
            "prints what came out.\n"
            "With --teacher, --student and --prompts: any two models that share a tokenizer."
        ),
        epilog="Defaults in pairs are 'demonstration / own models'. All entropies and divergences are in nats.",
    )

    def add(group: Any, flag: str, meaning: str, **settings: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if name in DEMO:
            meaning += f" (default: {DEMO[name]} / {OWN[name]})"
        elif settings.get("default") is not None:
            meaning += f" (default: {settings['default']})"
        group.add_argument(flag, help=meaning, **settings)

    models = parser.add_argument_group("own models (give all three)")
    add(models, "--teacher", "a folder or a hub name; never runs code from the hub", metavar="MODEL")
    add(models, "--student", "a folder or a hub name; the model that is trained", metavar="MODEL")
    add(
        models,
        "--prompts",
        ".txt, a prompt a line, or .jsonl, each line with 'prompt' (text) or 'messages' (chat)",
        metavar="FILE",
        type=Path,
    )
    add(
        models,
        "--torch-dtype",
        "of the teacher's weights; 'auto': as saved",
        default="float32",
        choices=DTYPES,
    )
    add(
        models,
        "--student-dtype",
        "of the student's weights, in which AdamW works: bfloat16 rounds small updates to nothing",
        default="float32",
        choices=DTYPES,
    )

    loss = parser.add_argument_group("loss")
    add(
        loss,
        "--objective",
        "reverse KL plus forward KL where the teacher is uncertain; or one KL alone; "
        "or 'both': reverse-kl, then entropy-aware, from the same start",
        choices=OBJECTIVES,
    )
    add(loss, "--tau", "the gate opens above this teacher entropy", type=number(float), default=0.8, metavar="X")
    add(
        loss,
        "--alpha",
        "weight of the forward KL where the gate is open",
        type=number(float, least=0),
        default=1.0,
        metavar="X",
    )
    add(
        loss,
        "--combine",
        "keep reverse KL where the gate is open (add) or replace it (switch)",
        default="add",
        choices=("add", "switch"),
    )
    add(
        loss,
        "--temperature",
        "of both distributions in the loss; sampling is always at 1",
        type=number(float, above=0),
        default=1.0,
        metavar="X",
    )

    training = parser.add_argument_group("training")
    positive = number(int, least=1)
    add(training, "--steps", "optimizer steps", type=positive, metavar="N")
    add(training, "--batch-size", "sampled completions per optimizer step", type=positive, metavar="N")
    add(training, "--micro-batch-size", "completions per forward and backward pass", type=positive, metavar="N")
    add(
        training,
        "--learning-rate",
        "of AdamW, after the warm-up; falls linearly to a tenth",
        type=number(float, above=0),
        metavar="X",
    )
    add(training, "--warmup-steps", "steps of linear warm-up", type=number(int, least=0), metavar="N")
    add(training, "--weight-decay", "of AdamW", type=number(float, least=0), default=0.0, metavar="X")
    add(
        training,
        "--max-grad-norm",
        "gradients are clipped to this norm",
        type=number(float, above=0),
        default=1.0,
        metavar="X",
    )
    add(training, "--max-new-tokens", "longest completion", type=positive, metavar="N")

    run = parser.add_argument_group("run")
    add(run, "--eval-prompts", "held-out prompts", type=positive, metavar="N")
    add(run, "--eval-samples", "completions per held-out prompt", type=positive, metavar="N")
    add(
        run,
        "--device",
        "such as cpu or cuda:0; 'auto' is cuda if there is one, cpu in the demonstration",
        default="auto",
    )
    add(run, "--seed", "of everything that is drawn", type=number(int, least=0), default=0, metavar="N")
    add(run, "--output", "the run folder, new or empty (default: runs/distill-<time>)", metavar="DIR", type=Path)

    demo = parser.add_argument_group("demonstration only")
    add(demo, "--teacher-steps", "supervised steps of the teacher", type=positive, default=400, metavar="N")
    add(demo, "--student-steps", "supervised steps of the student's start", type=positive, default=280, metavar="N")
    return parser


def parse_options(arguments: list[str] | None = None) -> Options:
    """The options of a command line, defaults filled in.

    Raises:
        UsageError: options that do not go together. A single bad value ends the program as argparse does (status 2).
    """
    parsed = vars(build_parser().parse_args(arguments))
    own = [name for name in ("teacher", "student", "prompts") if parsed[name] is not None]
    if own and len(own) < 3:
        missing = next(name for name in ("teacher", "student", "prompts") if parsed[name] is None)
        raise UsageError(f"--{missing}", f"missing; --{own[0]} needs --teacher, --student and --prompts together")
    for name, value in (OWN if own else DEMO).items():
        if parsed[name] is None:
            parsed[name] = value
    options = Options(**parsed)
    if options.demo and options.eval_samples < 8:
        raise UsageError("--eval-samples", f"pass@8 needs at least 8 samples per prompt, got {options.eval_samples}")
    return options
