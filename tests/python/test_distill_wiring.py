"""Every option that changes a number arrives where it changes it: one small run, listened to at its seams."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation import answering, evaluation, scenarios
from distillation.answering import SampledAnswers
from distillation.draws import seed_of, uniforms

from eopd_kernels import EntropyGate, Objective

from .small_run import arguments, lines

pytestmark = pytest.mark.usefixtures("undrawn")

WORDS = (
    *("--objective=paper", "--tau=2.9", "--alpha=0.5", "--max-steps=3", "--rollout-prompts=16", "--seed=5"),
    *("--off-policy-fraction=0.25", "--generation-batch-size=3", "--max-new-tokens=5"),
    *("--teacher-dtype=bfloat16", "--student-dtype=auto", "--attn-implementation=eager"),
    *("--eval-prompts=3", "--eval-samples=2", "--eval-max-new-tokens=7", "--eval-top-p=0.7"),
)


def test_options_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[Any, dict[str, Any]]]] = {}

    def listen(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            told.setdefault(name, []).append((given, options))
            return original(*given, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("OnPolicyTrainer", "SampledAnswers", "PromptStream"):
        listen(program, name)
    listen(answering, "sample")
    listen(evaluation, "StepTotals")
    listen(scenarios, "load_model")
    listen(SampledAnswers, "__call__")
    run = tmp_path / "run"
    assert program.main(arguments(tmp_path, *WORDS, f"--output-dir={run}")) == 0

    [(_, trainer)] = told["OnPolicyTrainer"]
    assert trainer["objective"] == replace(Objective.eopd_paper(), gate=EntropyGate(2.9), alpha=0.5)
    assert (trainer["tau"], trainer["vocab_size"], trainer["rollout_prompts"]) == (2.9, 40, 16)
    [((_, draws, seed), _)] = told["PromptStream"]
    assert (draws, seed) == (24, 5)
    assert [len(draws) for (source, draws), _ in told["__call__"] if source.max_new_tokens == 5] == [16, 8]
    [(_, source)] = told["SampledAnswers"]
    expected = {"seed": 5, "max_new_tokens": 5, "batch_size": 3, "off_policy_fraction": 0.25, "vocab_size": 40}
    assert source == {**expected, "synced": False, "autocast": source["autocast"]}
    loaded = {(argument, dtype, attention) for (argument, _, dtype, _, attention, *_), _ in told["load_model"]}
    assert loaded == {("--teacher", "bfloat16", "eager"), ("--student", "auto", "eager")}
    assert [tau for (tau, *_), _ in told["StepTotals"]] == [2.9]
    [((_, _, prompts), held_out)] = [call for call in told["sample"] if call[1]["max_new_tokens"] == 7]
    assert (held_out["top_p"], held_out["vocab_size"], held_out["synced"]) == (0.7, 40, False)
    assert [prompts.count(prompt) for prompt in prompts] == [2] * 6
    numbers = held_out["numbers"]
    assert numbers.shape == (6, 7) and len(numbers.unique()) == 42
    seeds = [seed_of("tokens", "5/held-out", number) for number in range(6)]
    assert torch.equal(numbers, uniforms(seeds, 7))
    writers = [line["writer"] for line in lines(run, "completions.jsonl")]
    assert set(writers) == {"student", "teacher"}
    results = json.loads((run / "results.json").read_text())
    assert (results["sets"], results["samples"], results["tau"]) == ({"held-out": 3}, 2, 2.9)


def test_given_completions_are_learnt_from(tmp_path: Path) -> None:
    words = arguments(tmp_path, "--max-steps=1", "--completion-column=reply", "--prompt-column=question")
    rows = [{"question": f"w{3 + i}", "prompt": "w39", "reply": f"w{20 + i} w9"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    assert program.main([*words, f"--prompts={tmp_path / 'rows.jsonl'}", f"--output-dir={run}"]) == 0
    asked = {row["question"]: f"{row['reply']}" for row in rows}
    for line in lines(run, "completions.jsonl"):
        assert line["writer"] == "data" and line["completion"] == asked[line["prompt"]]
