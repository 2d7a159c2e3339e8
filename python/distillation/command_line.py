"""From a command line, and the file that it may name, to options.

A file's entries stand in front of the command line's as if they had been written there: types, choices and errors are
the same, and the command line has the last word.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .errors import UsageError
from .options import DEMO, GROUPS, Options, TrainingOptions

ECHOED_ONLY = ("device", "processes", "versions")  # in config.json beside the options

DESCRIPTION = """\
On-policy distillation of one causal language model into another.

Without arguments: a demonstration on two CPU cores, offline, in a few minutes. It trains a
small teacher on a task of its own, distils a smaller student twice from the same start, and
prints what came out.
With --teacher, --student and --prompts: any two models that share a tokenizer.
"""
EPILOG = """\
All fields of transformers.TrainingArguments are options as well; the last group has those whose
defaults differ. Everything can stand in a YAML or JSON file, underscores for hyphens. All
entropies and divergences are in nats.
"""


class OneLineParser(HfArgumentParser):
    """Reports a bad argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def parse_options(arguments: list[str] | None = None) -> Options:
    """The options of a command line, defaults filled in.

    Raises:
        UsageError: a value outside its range, or options that do not go together. What argparse itself refuses ends
            the program as argparse does (status 2).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print_help()
        raise SystemExit(0)
    first = OneLineParser([], prog="distill.py", allow_abbrev=False, add_help=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    named, rest = first.parse_known_args(arguments)
    if named.resume is not None:
        more = [word for word in rest if not word.isdigit()]
        if named.config is not None or any(word.split("=")[0] != "--max-steps" for word in more):
            raise UsageError("--resume", "stands alone, but for --max-steps: a run goes on as its config.json has it")
        rest = [*from_file("--resume", named.resume / "config.json"), *rest, "--output-dir", str(named.resume)]
    elif named.config is not None:
        rest = [*from_file("--config", named.config), *rest]
    parser = OneLineParser(GROUPS, prog="distill.py", allow_abbrev=False, add_help=False)
    if not any(argument.split("=")[0] in ("--teacher", "--student", "--prompts") for argument in rest):
        parser.set_defaults(**DEMO)
    given = vars(parser.parse_args(rest))
    # A plan may be of another machine, whose options the library would refuse here: the plan reads them from `given`.
    elsewhere = {"fsdp": None, "deepspeed": None, "use_cpu": not torch.accelerator.is_available()}
    asked = given | (elsewhere if given["plan"] is not None else {})
    parts: list[Any] = [group(**{f.name: asked[f.name] for f in fields(group) if f.init}) for group in GROUPS]
    complete_deepspeed(parts[-1])
    parts.append(given)
    return Options(*parts)


def complete_deepspeed(args: TrainingOptions) -> None:
    """Has DeepSpeed do what the options say also where its file says nothing, and keep to them where it does."""
    unset_hf_deepspeed_config()  # else every model, the teacher too, would be shared out as it is loaded
    if args.deepspeed_plugin is None:
        return
    if found := getattr(args, "hf_deepspeed_config", None) and args.hf_deepspeed_config.mismatches:
        raise UsageError("--deepspeed", f"contradicts other options: {'; '.join(found)}; 'auto' takes theirs")
    if "LOCAL_RANK" not in os.environ:
        raise UsageError("--deepspeed", "needs a launcher: torchrun --nproc-per-node N python/distill.py ...")
    config = args.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["gradient_clipping"] = args.max_grad_norm
    # Without it ZeRO-3 refuses to save the student, at the end. They are saved in the dtype that they have.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def from_file(argument: str, path: Path) -> list[str]:
    """The entries of a YAML or JSON file as a command line."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UsageError(argument, f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(argument, f"{str(path)!r} must hold names and values, not a {type(content).__name__}")
    known = [f.name for group in GROUPS for f in fields(group) if f.init]
    words: list[str] = []
    for name, value in content.items():
        if name in ECHOED_ONLY:
            continue
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; is {close[0]!r} meant?" if close else ""
            raise UsageError(argument, f"{str(path)!r} has {name!r}, which is no option{hint}")
        words += as_words(name, value)
    return words


def as_words(name: str, value: Any) -> list[str]:
    """One option; nothing for a value that stands for the default."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if value is True:
        return [f"--{name}"]  # also for options that are true or a text
    return [f"--{name}={'false' if value is False else value}"]


def print_help() -> None:
    """Our own options; those of transformers by name only."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "distill.py", "%(prog)s [options]", DESCRIPTION, EPILOG, formatter_class=form, add_help=False
    )
    first = parser.add_argument_group("from where")
    first.add_argument("--config", metavar="FILE", help="a .yaml or .json file with any of these")
    first.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, or with more --max-steps")
    first.add_argument("--output-dir", metavar="DIR", help="the run folder, new or empty; default: runs/distill-<time>")
    for group in GROUPS:
        shown = parser.add_argument_group((group.__doc__ or "").strip().rstrip("."))
        for option in fields(group):
            default = option.default
            inherited = group is TrainingOptions and option.name not in TrainingOptions.__annotations__
            if inherited or option.metadata["help"] == "fixed":
                continue
            text = option.metadata["help"]
            if option.name in DEMO:
                text += f" (default: {default}; {DEMO[option.name]} in the demonstration)"
            elif default not in (None, ""):
                text += f" (default: {default})"
            flag = f"--{option.name.replace('_', '-')}"
            shown.add_argument(flag, metavar="X", help=text.replace("%", "%%"))
    parser.print_help()
