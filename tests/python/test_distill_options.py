"""Options from the command line, from files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distillation.command_line import parse_options
from distillation.errors import UsageError

from eopd_kernels import Objective

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = ["--use-cpu", "--bf16", "false", "--fsdp="]


def parsed(tmp_path: Path, content: Any, *more: str, suffix: str = ".yaml") -> Any:
    file = tmp_path / f"options{suffix}"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return parse_options(["--config", str(file), "--use-cpu", *more])


@pytest.mark.parametrize(("task", "size", "epochs"), [("math", "0.6b", 3), ("math", "1.7b", 3), ("dapo-14k", "4b", 2)])
def test_the_papers_settings(task: str, size: str, epochs: int) -> None:
    options = parse_options(["--config", str(CONFIGS / f"{task}-qwen3-{size}.yaml"), *CPU])
    assert options.models.teacher == "Qwen/Qwen3-8B"
    assert options.models.student == f"Qwen/Qwen3-{size.upper()}-Base"
    training = options.training
    assert training.learning_rate == 3e-6 and training.lr_scheduler_type == "cosine"
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert options.loss.temperature == 1 and options.rollouts.max_new_tokens == 4096
    assert options.rollouts.rollout_prompts == 128 and training.num_train_epochs == epochs and training.max_steps == -1
    assert (options.loss.objective, options.loss.tau, options.loss.alpha) == ("paper", 0.8, 1.0)
    assert options.loss.objectives["paper"] == Objective.eopd_paper()
    assert options.prompts.template_arguments() == {"enable_thinking": False}
    assert options.prompts.prompt_suffix == r" Let's think step by step and output the final answer within \boxed{}."
    assert (
        options.prompts.eval_prompt_suffix == r" Please reason step by step, and put your final answer within \boxed{}."
    )
    evaluation = options.run
    assert (evaluation.eval_top_p, evaluation.eval_max_new_tokens, evaluation.eval_samples) == (0.8, 8192, 8)
    assert (evaluation.eval_prompts, evaluation.eval_sets) == (0, ["MATH-500", "AIME-2024", "AIME-2025", "AMC23"])


def test_every_file_in_configs_is_known() -> None:
    for file in CONFIGS.glob("*.yaml"):
        parse_options(["--config", str(file), *CPU])


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    options = parsed(tmp_path, "learning_rate: 3e-6\ntau: 0.5\nuse_cpu: true\n", "--tau", "0.7")
    assert options.training.learning_rate == 3e-6  # YAML reads 3e-6 as a text
    assert options.loss.tau == 0.7
    assert options.training.max_steps == 120 and options.demo  # the demonstration's own default


def test_json_and_what_was_echoed_are_read_as_well(tmp_path: Path) -> None:
    first = parsed(tmp_path, {"alpha": 0.25, "chat": True, "lr_scheduler_kwargs": {"num_cycles": 0.5}}, suffix=".json")
    assert first.loss.alpha == 0.25 and first.prompts.chat
    echoed = {**first.given, "device": "cpu", "processes": 1, "versions": {"torch": "2"}}
    again = parsed(tmp_path, json.dumps(echoed, default=str), suffix=".json")
    assert again.given == first.given and again.loss == first.loss


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "has 'learning_rat', which is no option; is 'learning_rate' meant?"),
        ("- tau", "must hold names and values, not a list"),
        ("tau: [", "cannot read"),
        ("tau: .inf", "argument --tau: inf is not a finite number"),
        ("off_policy_fraction: 1.5", "argument --off-policy-fraction: 1.5 is not a number from 0 to 1"),
        ("chat_template_kwargs: '[1]'", "argument --chat-template-kwargs: '[1]' is not a JSON object"),
        ("torch_compile: true", "argument --torch-compile: True is not supported by this program: leave it False"),
        ("eval_strategy: steps", "argument --eval-strategy: "),
        (
            "rollout_prompts: 192",
            "argument --rollout-prompts: 192 is not a multiple of the 128 prompts of an optimizer",
        ),
        ("rollout_prompts: 0", "argument --rollout-prompts: 0 is not a multiple of "),
        ("eval_top_p: 1.5", "argument --eval-top-p: 1.5 is not a number above 0, at most 1"),
        ("eval_max_new_tokens: 0", "argument --eval-max-new-tokens: 0 is not an integer of at least 1"),
        ("max_steps: 0", "argument --max-steps: 0 is not an integer of at least 1"),
        ("fsdp: true", "argument --fsdp: "),
    ],
)
def test_what_is_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(tmp_path, content)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_value_of_the_wrong_kind_ends_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(tmp_path, "eval_prompts: many")
    assert "argument --eval_prompts/--eval-prompts: invalid int value: 'many'" in capsys.readouterr().err
