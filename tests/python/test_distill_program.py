"""The program from end to end: its files, its two modes, its errors, its end by Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from datasets import Dataset
from distillation import answering, demonstration
from distillation.answering import SampledAnswers
from distillation.errors import RunError
from distillation.options import DEMO, GROUPS, PromptOptions, TrainingOptions
from distillation.prompts import encode_prompts, records
from distillation.rollouts import sample
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import EOS, VOCABULARY, tiny_words

PROGRAM = Path(program.__file__)
TIMINGS = {
    *("tokens_per_second", "peak_memory_mib", "loss_share"),
    *(f"{part}_seconds" for part in ("rollout", "teacher", "student", "loss", "optimizer")),
}
SPLIT = ("reverse_kl", "forward_kl", "teacher_entropy", "student_entropy")
METRICS = {
    *("run", "step", "loss", "gate_fraction", "grad_norm", "learning_rate"),
    *("completion_length", "clipped_fraction", "tokens"),
    *(f"{name}{split}" for name in SPLIT for split in ("", "_open", "_closed")),
    *TIMINGS,
}
TINY = PROGRAM.parents[1] / "configs" / "tiny.yaml"
SMALL_DEMO = [
    *("--max-steps", "3", "--per-device-train-batch-size", "3", "--gradient-accumulation-steps", "2"),
    *("--teacher-steps", "12", "--student-steps", "4", "--eval-prompts", "4", "--eval-samples", "8"),
]


@pytest.fixture(autouse=True)
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "TRAINING_PROBLEMS", 60)
    monkeypatch.setattr(demonstration, "SUPERVISED_BATCH", 16)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_tiny_configuration_runs(tmp_path: Path) -> None:
    assert program.main(["--config", str(TINY), "--output-dir", str(tmp_path / "run")]) == 0
    assert [record["step"] for record in logged(tmp_path / "run")] == [1, 2, 1, 2]
    assert (tmp_path / "run" / "report.html").exists()


def test_the_demonstration_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert program.main([*SMALL_DEMO, "--output-dir", str(folder)]) == 0
    records = logged(folder)
    assert [(record["run"], record["step"]) for record in records] == [
        (objective, step) for objective in ("reverse-kl", "entropy-aware") for step in (1, 2, 3)
    ]
    assert all(set(record) == METRICS for record in records)
    # The same start and the same seed: until the first update the two arms see the same tokens.
    assert records[0]["reverse_kl"] == records[3]["reverse_kl"] and records[0]["tokens"] == records[3]["tokens"]
    assert records[3]["loss"] > records[0]["loss"]
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 3
    results = json.loads((folder / "results.json").read_text())
    assert {name: results[name] for name in ("task", "sets", "samples", "tau")} == {
        **{"task": "coins", "sets": {"held-out": 4}, "samples": 8, "tau": 0.8}
    }
    names = ["teacher", "student at start", "reverse-kl", "entropy-aware"]
    assert [row["name"] for row in results["models"]] == names
    for row in results["models"]:
        assert len(row["correct"]) == 4 and all(set(outcomes) <= {0, 1} for outcomes in row["correct"])
        assert {"student_entropy_uncertain", "forward_kl_uncertain", "tokens"} <= set(row["agreement"])
    assert results["models"][0]["agreement"]["forward_kl_uncertain"] == pytest.approx(0, abs=1e-5)
    for name in ("completions", "histograms"):
        kept = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert {record["run"] for record in kept} == {"reverse-kl", "entropy-aware"}
    by_step = {(record["run"], record["step"]): record["tokens"] for record in records}
    for record in kept:
        assert len(record["edges"]) == 1 + len(record["student_entropy"])
        assert sum(record["student_entropy"]) == by_step[record["run"], record["step"]]

    weights = {}
    for name in ("teacher", "student-start", "student-reverse-kl", "student-entropy-aware"):
        assert (folder / name / "model.safetensors").exists()
        weights[name] = AutoModelForCausalLM.from_pretrained(folder / name).state_dict()["model.norm.weight"]
        assert AutoTokenizer.from_pretrained(folder / name).eos_token == "<eos>"
    students = [weights[name] for name in weights if name.startswith("student")]
    assert not torch.equal(students[0], students[1]) and not torch.equal(students[1], students[2])

    written = capsys.readouterr()
    assert written.err == ""  # no progress bar where there is no terminal
    for part in ("pass@1", "pass@8", "held-out prompts: 4", "samples per prompt: 8", "entropy-aware", str(folder)):
        assert part in written.out
    assert len(written.out.splitlines()) < 40
    assert max(map(len, written.out.replace(str(tmp_path), "").splitlines())) <= 120


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        smaller = ["--max-steps", "2", "--eval-prompts", "2", "--teacher-steps", "2", "--student-steps", "1"]
        arguments = ["--objective", "entropy-aware", "--seed", seed, "--output-dir", str(tmp_path / name)]
        assert program.main([*SMALL_DEMO, *smaller, *arguments]) == 0
        records = [{k: v for k, v in record.items() if k not in TIMINGS} for record in logged(tmp_path / name)]
        runs.append((records, (tmp_path / name / "results.json").read_text()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize(
    ("form", "choice", "objectives"),
    [
        (".txt", [], ["entropy-aware"]),
        (".txt", ["--objective", "paper", "--off-policy-fraction", "0.5"], ["paper"]),
        (".jsonl", ["--objective", "both", "--teacher-dtype", "bfloat16"], ["reverse-kl", "entropy-aware"]),
    ],
)
def test_own_models_and_prompts(
    form: str,
    choice: list[str],
    objectives: list[str],
    tmp_path: Path,
    saved_model: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The student's head has padding rows that its tokenizer does not know, as in families of open models.
    teacher = saved_model("teacher", "llama", tiny_words())
    student = saved_model("student", "gpt2", tiny_words(), vocab_size=VOCABULARY + 8)
    texts = [" ".join(f"w{3 + (i + j) % 30}" for j in range(1 + i % 4)) for i in range(20)]
    prompts = tmp_path / f"prompts{form}"
    lines = texts if form == ".txt" else [json.dumps({"prompt": text}) for text in texts]
    prompts.write_text("\n".join(lines) + "\n\n")
    folder = tmp_path / "run"
    arguments = ["--teacher", teacher, "--student", student, "--prompts", str(prompts), "--output-dir", str(folder)]
    small = ["--max-steps", "2", "--per-device-train-batch-size", "2", "--max-new-tokens", "6", "--use-cpu"]
    assert program.main([*arguments, *small, *choice, "--eval-prompts", "4", "--learning-rate", "0.01"]) == 0
    records = logged(folder)
    steps = [(record["run"], record["step"]) for record in records]
    assert steps == [(objective, step) for objective in objectives for step in (1, 2)]
    assert len({record["reverse_kl"] for record in records if record["step"] == 1}) == 1  # the same first tokens
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (student, folder / f"student-{objectives[-1]}")
    )
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not (folder / "teacher").exists()
    out = capsys.readouterr().out
    assert "16 prompts to train on, 4 held out" in out and "pass@" not in out


def test_the_evaluation_has_a_suffix_a_length_and_a_share_of_its_own(
    tmp_path: Path, saved_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_model("model", "llama", tiny_words())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{10 + i}", "answer": "w5"}) + "\n" for i in range(12)))
    asked: list[tuple[list[list[int]], dict[str, Any]]] = []
    trained_on: set[tuple[int, ...]] = set()
    answer = SampledAnswers.__call__

    def sampled(model: Any, tokenizer: Any, batch: list[list[int]], **options: Any) -> Any:
        if options["max_new_tokens"] == 5:
            asked.append((batch, options))
        return sample(model, tokenizer, batch, **options)

    def answered(self: Any, draws: Any) -> Any:
        if self.max_new_tokens != 5:
            trained_on.update(tuple(draw.prompt.ids) for draw in draws)
        return answer(self, draws)

    monkeypatch.setattr(answering, "sample", sampled)
    monkeypatch.setattr(SampledAnswers, "__call__", answered)
    own = ["--teacher", model, "--student", model, "--prompts", str(prompts), "--output-dir", str(tmp_path / "run")]
    small = ["--max-steps", "1", "--max-new-tokens", "3", "--eval-prompts", "4", "--use-cpu", "--prompt-suffix", " w6"]
    its = ["--eval-prompt-suffix", " w8", "--eval-max-new-tokens", "5", "--eval-top-p", "0.7", "--eval-samples", "2"]
    assert program.main([*own, *small, *its]) == 0
    # The teacher, the student at its start and the trained one, each once.
    assert len(asked) == 3 and all(batch == asked[0][0] for batch, _ in asked)
    ids = [tuple(prompt) for prompt in asked[0][0]]
    assert ids[::2] == ids[1::2] and len(set(ids)) == 4
    assert all(len(prompt) == 2 and prompt[-1] == 8 for prompt in ids)
    assert len(trained_on) == 8 and {prompt[1] for prompt in trained_on} == {6}
    assert {prompt[0] for prompt in ids} | {prompt[0] for prompt in trained_on} == set(range(10, 22))
    assert [(told["max_new_tokens"], told["top_p"]) for _, told in asked] == [(5, 0.7)] * 3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(row["correct"]) for row in results["models"]] == [4] * 3
    longer = [*own[:-1], str(tmp_path / "other"), *small, "--eval-max-new-tokens", "47"]
    assert program.main(longer) == 2  # beyond the models' positions


def test_chats_go_through_the_template(tmp_path: Path, saved_model: Callable[..., str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved_model("student", "llama", tiny_words()))
    prompts = tmp_path / "chats.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "w5 w6"}], "answer": 7}\n')
    options = PromptOptions(prompts=str(prompts), enable_thinking=False)
    with pytest.raises(RunError, match=r"line 1: is a chat, but neither tokenizer has a chat template"):
        encode_prompts(records(options), options, tokenizer)
    tokenizer.chat_template = (
        "w3 {{ messages[0]['content'] }}{% if add_generation_prompt %} w4{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %} w9{% endif %}"
    )
    (found,) = encode_prompts(records(options), options, tokenizer)
    assert (found.ids, found.text, found.answer) == ([3, 5, 6, 4, 9], "w5 w6", "7")
    texts = tmp_path / "texts.parquet"
    Dataset.from_dict({"question": ["w5", "w6", "w5"], "reply": ["w7 w8"] * 3}).to_parquet(texts)
    options = PromptOptions(
        prompts=str(texts), prompt_column="question", prompt_suffix=" w8", chat=True, completion_column="reply"
    )
    found_too = encode_prompts(records(options), options, tokenizer)
    assert [prompt.ids for prompt in found_too] == [[3, 5, 8, 4], [3, 6, 8, 4]]
    assert found_too[0].completion == [7, 8, EOS]


def test_tokenizers_that_disagree_are_refused(
    tmp_path: Path, saved_model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words()
    teacher = saved_model("teacher", "llama", [*words[:10], *reversed(words[10:])], vocab_size=VOCABULARY + 8)
    student = saved_model("student", "llama", words)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w3\nw4\n")
    arguments = ["--teacher", teacher, "--student", student, "--prompts", str(prompts), "--eval-prompts", "1"]
    assert program.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "the student has 40 ids and the teacher 48" in error
    assert "first id 10: 'w10' for the student, 'w39' for the teacher" in error
    assert len(error.splitlines()) == 1


OWN = ["--teacher", "{folder}", "--student", "{folder}", "--prompts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "high"], "argument --tau: invalid float value: 'high'"),
        (["--tau", "nan"], "argument --tau: nan is not a finite number"),
        (["--alpha", "-1"], "argument --alpha: -1.0 is not a number of at least 0"),
        (["--temperature", "0"], "argument --temperature: 0.0 is not a number above 0"),
        (["--max-steps", "0"], "argument --max-steps: 0 is not an integer of at least 1"),
        (["--eval-prompts", "2.5"], "argument --eval_prompts/--eval-prompts: invalid int value: '2.5'"),
        (
            ["--objective", "paper", "--temperature", "2"],
            "--temperature: 2.0 is not 1, at which completions are sampled",
        ),
        (["--objective", "jsf"], "argument --objective: 'jsf' is no preset, those are both, "),
        (["--combine", "mix"], "argument --combine: invalid choice: 'mix'"),
        (["--steps", "3"], "unrecognized arguments: --steps"),
        (["--eval-samples", "7"], "argument --eval-samples: pass@8 needs at least 8 samples per prompt, got 7"),
        (["--teacher", "a"], "argument --student: missing; --teacher needs"),
        (["--student", "a", "--prompts", "p.txt"], "argument --teacher: missing; --student needs"),
        (["--output-dir", "{file}"], "argument --output-dir: cannot use "),
        (["--output-dir", "{folder}"], "is not empty; a run needs a folder of its own"),
        (
            ["--teacher", "{folder}", "--student", "{folder}", "--prompts", "{folder}/none.txt"],
            "argument --prompts: cannot read ",
        ),
        (
            [*OWN, "p.txt", "--completion-column", "reply", "--objective", "paper"],
            "argument --objective: 'paper' needs completions that are sampled, not a --completion-column",
        ),
        ([*OWN, "{file}"], "must end in .txt, .jsonl, .parquet"),
        ([*OWN, "{folder}/p.txt"], "argument --student: cannot load a tokenizer"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "p.txt").write_text("w3\nw4\n")
    (tmp_path / "file").write_text("")
    filled = [argument.format(folder=tmp_path / "folder", file=tmp_path / "file") for argument in arguments]
    try:
        status: Any = program.main(filled)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error and error.startswith("distill.py: error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "extra", "message"),
    [
        (["not json"], [], "line 1: not JSON"),
        (['{"prompt": "w3"}', '{"text": "w4"}'], [], "line 2: needs a 'prompt'"),
        (['{"prompt": "w3"}'] * 2, [], "1 different prompts and --eval-prompts keeps 1"),
        (['{"prompt": "w3"}', '{"prompt": "w4"}'], ["--max-new-tokens", "48"], "make 49, but the teacher has 48"),
    ],
)
def test_prompts_that_cannot_be_used(
    lines: list[str],
    extra: list[str],
    message: str,
    tmp_path: Path,
    saved_model: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = saved_model("model", "llama", tiny_words())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    arguments = [
        "--teacher",
        model,
        "--student",
        model,
        "--prompts",
        str(prompts),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert program.main([*arguments, "--eval-prompts", "1", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_help_fits_a_terminal_and_names_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    own = [group for group in GROUPS if group is not TrainingOptions]
    for name in [*DEMO, *(option.name for group in own for option in dataclasses.fields(group))]:
        assert name == "use_cpu" or f"--{name.replace('_', '-')} " in text


def test_the_file_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--tau", "high"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert run.stderr == "distill.py: error: argument --tau: invalid float value: 'high'\n"
    assert not list(tmp_path.iterdir())
