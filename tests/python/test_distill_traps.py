"""Mistakes that would cost a run are refused, or said, before a model is loaded and before anything is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import distill as program
import pytest
from distillation import scenarios
from distillation.command_line import print_help
from distillation.errors import RunError
from distillation.options import PromptOptions
from distillation.prompts import encode_prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, trainer_optimizer

from .conftest import tiny_tokenizer, tiny_words
from .small_run import arguments, lines

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a model is loaded, and where the hub would be asked."""

    def load(*given: Any) -> Any:
        raise AssertionError(f"loaded {given}")

    monkeypatch.setattr(scenarios, "load_model", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts={folder}/promts.txt"], "argument --prompts: cannot read "),
        (["--prompts=data/prompts.json"], "argument --prompts: cannot read 'data/prompts.json': there is no such file"),
        (["--prompts=./prompts"], "argument --prompts: cannot read './prompts': there is no such file"),
        (["--prompts={folder}/more/prompts.parquet"], "more/prompts.parquet': there is no such file"),
        (["--teacher={folder}/teachr"], "/teachr' is no folder here, and no name on the hub either"),
        (["--student=../student"], "argument --student: '../student' is no folder here, and no name on the hub either"),
        (["--student={folder}/adapter", "--lora-r=2"], "argument --lora-r: "),
        (["--student={folder}/lost"], "/lost' is an adapter to './nowhere', which is no folder here, nor a hub name"),
        (["--student={folder}/ia3"], "/ia3' is an adapter (IA3); possible is LORA"),
        (["--optim=adamw_bnb_8bit"], "argument --optim: You need to install `bitsandbytes`"),
        (["--optim=adamw_torch_8bit"], "argument --optim: You need to have `torchao>=0.4.0`"),
        (["--teacher-quantization=bitsandbytes-4bit"], "argument --teacher-quantization: 'bitsandbytes-4bit' is not"),
        (["--teacher-quantization=torchao-int8"], "is not possible: torchao is not installed"),
        (["--report-to=none", "--report-to=tensorbord"], "argument --report-to: tensorbord is not supported"),
        (["--report-to=wandb"], "argument --report-to: WandbCallback requires wandb to be installed"),
        (["--rollout-engine=vllm"], "argument --rollout-engine: vllm cannot be imported here"),
        (["--eval-prompts=30"], "holds 30 different prompts and --eval-prompts keeps 30"),
    ],
)
def test_nothing_is_loaded_or_written_for_a_mistake(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    found, absent = importlib.util.find_spec, ("bitsandbytes", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    for name in absent:
        monkeypatch.setattr(trainer_optimizer, f"is_{name}_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, change in (("lost", {"base_model_name_or_path": "./nowhere"}), ("ia3", {"peft_type": "IA3"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(folder=tmp_path) for word in words]
    capsys.readouterr()
    assert program.main([*given, *words, "--output-dir", str(tmp_path / "deep" / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_only_the_models_can_tell_blocks_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, "--max-steps=1", "--output-dir", str(tmp_path / "run"))
    assert program.main([*words, "--max-new-tokens=48"]) == 2
    assert "but the teacher has 48" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert program.main(words) == 0
    assert program.main(words) == 2
    assert "is not empty; a run needs a folder of its own" in capsys.readouterr().err


def test_a_chat_that_ends_with_the_answer_is_asked_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(tiny_words())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w39"
    turns = [
        {"role": role, "content": f"w{5 + i}"} for i, role in enumerate(("user", "assistant", "user", "assistant"))
    ]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("a", {"messages": turns}),
        ("b", {"messages": turns[:1]}),
        ("c", {"messages": [*turns[:1], *turns[1:2] * 2]}),
        ("d", {"messages": turns[:3]}),
    ]
    found = encode_prompts(rows, PromptOptions(), tokenizer)
    assert [prompt.ids for prompt in found] == [[5, 6, 7, 39], [5, 39]]  # the others repeat these
    assert found[0].text == "w7"
    out = capsys.readouterr().out
    assert "2 of 4 chats end with an answer, which is no part of the prompt" in out
    assert "2 of 4 prompts repeat an earlier one and are left out" in out
    with pytest.raises(RunError, match="--prompts: e: needs "):
        encode_prompts([("e", {"messages": turns[1:2]})], PromptOptions(), tokenizer)


def test_repeated_and_long_prompts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, "--max-steps=1", "--eval-prompts=2", "--max-prompt-tokens=4")
    (tmp_path / "prompts.txt").write_text("w3\nw4\nw3\nw5 w6\nw3 w4 w5 w6 w7\nw3\nw8 w9\n")
    assert program.main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "2 of 7 prompts repeat an earlier one and are left out" in out
    assert "1 of 5 prompts exceed --max-prompt-tokens 4 and are left out" in out
    assert "2 prompts to train on, 2 held out" in out


def test_a_finished_run_takes_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = arguments(tmp_path, "--max-steps=2", "--lr-scheduler-type=constant", "--warmup-steps=0")
    assert program.main([*words, "--output-dir", str(run)]) == 0
    weights = run / "student-entropy-aware" / "model.safetensors"
    two, teacher = weights.read_bytes(), json.loads((run / "results.json").read_text())["models"][0]
    assert program.main(["--resume", str(run), "--max-steps", "4"]) == 0
    assert "from step 2, as" in capsys.readouterr().out
    assert [record["step"] for record in lines(run)] == [1, 2, 3, 4]
    whole = tmp_path / "whole"
    assert program.main([*words, "--max-steps=4", "--output-dir", str(whole)]) == 0
    assert two != weights.read_bytes() == (whole / "student-entropy-aware" / "model.safetensors").read_bytes()
    assert (run / "results.json").read_text() == (whole / "results.json").read_text()
    assert json.loads((run / "results.json").read_text())["models"][0] == teacher
    assert json.loads((run / "config.json").read_text())["max_steps"] == 4
    assert program.main(["--resume", str(run), "--max-steps=3"]) == 2
    assert "argument --max-steps: the run has 4 steps already" in capsys.readouterr().err
    assert program.main(["--resume", str(run), "--tau=1"]) == 2
    assert "argument --resume: stands alone, but for --max-steps" in capsys.readouterr().err


def test_help_lists_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    print_help()
    text = capsys.readouterr().out
    for option in ("use-cpu", "bf16", "report-to", "save-steps", "max-steps", "output-dir", "resume"):
        assert f"  --{option} " in text, option
