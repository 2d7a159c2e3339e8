"""Several teachers in one batch: each sequence is compared with its own, whatever the company, and a run is a run."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation.command_line import parse_options
from distillation.errors import UsageError
from distillation.plan import planned
from distillation.prompts import Prompt
from distillation.rollouts import Rollouts, collate, sample
from distillation.run_folder import RunFolder
from distillation.scenarios import load_scenario
from distillation.served_teacher import ServedTeacher
from distillation.stream import Draw
from distillation.teachers import Teachers, by_teacher, teachers_of
from distillation.training import score
from transformers import AutoModelForCausalLM

from eopd_kernels import Objective, TopK

from .conftest import EOS, PAD, tiny_model, tiny_tokenizer, tiny_words
from .served_model import ServedModel
from .small_run import arguments, comparable, lines

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")
PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
NAMES = ["math", "code", "code", "math"]
OF_PROMPT = dict(zip(map(tuple, PROMPTS), NAMES, strict=True))
TAILED = Objective(reverse="sampled", forward=TopK(teacher="raw", tail=True), gate="always")
FIGURES = ("teacher_entropy", "student_entropy", "reverse_kl", "forward_kl", "gate")


def drawn(student: Any) -> Rollouts:
    """The last prompt's completion is the longest, so that the others' teacher sees a narrower part."""
    found = sample(student, tiny_tokenizer(tiny_words()), PROMPTS, max_new_tokens=6).sequences([EOS])
    for length, one in zip((2, 3, 1, 6), found, strict=True):
        del one.ids[length:], (one.log_probs or [])[length:]
    return collate(found, PAD, CPU)


@pytest.mark.parametrize("objective", [Objective(), Objective.eopd_paper()], ids=["entropy-aware", "paper"])
@pytest.mark.parametrize("counted", [False, True])
def test_each_sequence_has_its_own_teacher(objective: Objective, counted: bool) -> None:
    student, named = tiny_model("llama"), {"math": tiny_model("gpt2"), "code": tiny_model("gemma2")}
    for model in named.values():
        model.requires_grad_(False)
    rollouts = drawn(student)
    tokens = int(rollouts.completion_mask.sum())
    more: dict[str, Any] = {"num_items": tokens} if counted else {}
    seen = score(student, Teachers(dict(named), OF_PROMPT), rollouts, objective, **more)
    seen.loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    total = torch.zeros(())
    for i, name in enumerate(NAMES):
        alone = score(student, named[name], rollouts.rows([i]), objective, num_items=tokens)
        total = total + alone.loss
        for figure in FIGURES:
            torch.testing.assert_close(getattr(seen, figure)[i], getattr(alone, figure)[0])
    total.backward()
    torch.testing.assert_close(seen.loss, total)
    assert gradients
    for parameter, value in student.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[parameter], value.grad)
    assert not seen.teacher_entropy_is_lower_bound


def test_a_served_teacher_beside_another_one() -> None:
    student, local, far = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    for model in (local, far):
        model.requires_grad_(False)
    rollouts = drawn(student)
    server = ServedModel(far, tiny_tokenizer(tiny_words()))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        served = ServedTeacher(server.url, k=8, timeout=60.0, device=CPU)
        both = Teachers({"math": local, "code": served}, OF_PROMPT)
        both.ask(rollouts.sequences([]))
        assert {ids[:1] for ids in served.asked} == {(6,), (7,)}
        seen = score(student, both, rollouts, TAILED)
        alone = score(student, served, rollouts, TAILED)
    finally:
        server.shutdown()
        server.server_close()
    torch.testing.assert_close(seen.forward_half[1:3], alone.forward_half[1:3])
    assert not torch.allclose(seen.forward_half[[0, 3]], alone.forward_half[[0, 3]], atol=1e-3)
    assert seen.teacher_entropy_is_lower_bound


def test_each_teacher_answers_its_prompts() -> None:
    models: dict[str, Any] = {"math": torch.nn.Identity(), "code": torch.nn.Tanh()}
    draws = [Draw(i, Prompt(ids, "")) for i, ids in enumerate(PROMPTS)]
    asked: list[tuple[Any, list[int]]] = []

    def answer(model: Any, its: list[Draw]) -> list[Any]:
        asked.append((model, [draw.number for draw in its]))
        return [f"answer {draw.number}" for draw in its]

    assert by_teacher(Teachers(models, OF_PROMPT), draws, answer) == [f"answer {i}" for i in range(4)]
    assert asked == [(models["math"], [0, 3]), (models["code"], [1, 2])]


def test_a_prompt_without_a_teacher_or_with_two_is_refused() -> None:
    prompts = [Prompt([3], "", place=f"row {i}", teacher=name) for i, name in enumerate(("a", "b", ""), start=1)]
    with pytest.raises(UsageError, match="row 2: another row has the same prompt and another teacher"):
        teachers_of(prompts[:2], ["a", "b"])
    with pytest.raises(UsageError, match="row 3: '' is none of a, b"):
        teachers_of(prompts[2:], ["a", "b"])
    assert teachers_of([*prompts[:1], *prompts[:1]], ["a"]) == {(3,): "a"}


def several(folder: Path, *more: str) -> list[str]:
    """A run with two teachers, the second of them another architecture, and prompts that name them."""
    words = arguments(folder)
    torch.manual_seed(7)
    tiny_model("gpt2").save_pretrained(folder / "other")
    tiny_tokenizer(tiny_words()).save_pretrained(folder / "other")
    rows = [{"prompt": f"w{3 + i} w{9 + i}", "domain": "math" if i % 3 else "code"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = json.dumps({"math": str(folder / "teacher"), "code": str(folder / "other")})
    chosen = [f"--prompts={folder / 'rows.jsonl'}", f"--teacher={named}", "--teacher-column=domain"]
    return [*words, *chosen, "--eval-samples=2", *more]


def test_a_run_with_two_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--objective=paper", "--off-policy-fraction=0.5", "--lr-scheduler-type=constant_with_warmup")
    words = several(tmp_path, *chosen, f"--output-dir={tmp_path / 'run'}")
    assert program.main([*words, "--max-steps=3"]) == 0
    said = capsys.readouterr().out
    assert "teacher: math: LlamaForCausalLM of" in said and ", code: GPT2LMHeadModel of" in said
    assert {line["writer"] for line in lines(tmp_path / "run", "completions.jsonl")} == {"student", "teacher"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    agreement = {row["name"]: row["agreement"] for row in results["models"]}
    assert agreement["teacher"] == {} and agreement["paper"]["forward_kl_uncertain"] > 0
    assert program.main(["--resume", str(tmp_path / "run"), "--max-steps", "4"]) == 0
    straight = several(tmp_path, *chosen, f"--output-dir={tmp_path / 'one'}")
    assert program.main([*straight, "--max-steps=4"]) == 0
    kept, whole = ([comparable(line) for line in lines(tmp_path / name)] for name in ("run", "one"))
    assert [line["step"] for line in kept] == [1, 2, 3, 4] and kept == whole


def test_both_are_loaded_planned_for_and_end_alike(tmp_path: Path) -> None:
    words = several(tmp_path, "--max-new-tokens=4")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    other.generation_config.eos_token_id = [EOS, 8]
    other.save_pretrained(tmp_path / "other")
    options = parse_options(words)
    scenario = load_scenario(options, RunFolder(tmp_path / "run", resumed=False), CPU)
    assert isinstance(scenario.teacher, Teachers) and scenario.eos_ids == [EOS, 8]
    models: list[Any] = list(scenario.teacher.models)
    ends = [model.generation_config.eos_token_id for model in models]
    assert ends == [[EOS, 8]] * 2 == [scenario.load_student().generation_config.eos_token_id] * 2
    size = sum(p.nbytes for model in scenario.teacher.models for p in model.parameters())
    assert dict(planned(options, CPU, 1, 8))["teacher"]["step"] == pytest.approx(size / 2**30)
    held = scenario.held_out["held-out"]
    assert {prompt.teacher for prompt in scenario.training + held} == {"math", "code"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-column=subject"], "'' is none of math, code"),
        (["--teacher={math: nowhere/at/all, code: nowhere/at/all}"], "'nowhere/at/all' is no folder here"),
        (["--teacher={math: ["], "argument --teacher: '{math: [' is no block of names"),
        (["--teacher=one/model"], "argument --teacher-column: needs --teacher {NAME: it, ...}"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*several(tmp_path), *words, f"--output-dir={tmp_path / 'run'}"]
    capsys.readouterr()
    assert program.main(given) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error, error
    assert not (tmp_path / "run").exists()
