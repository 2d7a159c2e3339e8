"""What is evaluated with, and that the figures depend on nothing else: not on batches, training, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import distill as program
import pytest
import torch
from distillation import answering, evaluation
from distillation.command_line import parse_options
from distillation.errors import UsageError
from distillation.held_out import HUB_SETS, evaluation_sets
from distillation.rollouts import Completion, collate, pieces, sample
from distillation.trainer import PER_TOKEN, OnPolicyTrainer
from distillation.training import score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .conftest import PAD, tiny_tokenizer, tiny_words
from .small_run import arguments, lines

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ("--max-steps=3", "--eval-prompts=3", "--eval-samples=2", "--eval-max-new-tokens=12")


@pytest.fixture(autouse=True)
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is right where its answer, which need not end, has as few words below w20 as "answer" mod 2."""

    def is_right(completion: str, answer: str, check: str) -> bool:
        return sum(int(word[1:]) < 20 for word in completion.split() if word[0] == "w") % 2 == int(answer[1:]) % 2

    monkeypatch.setattr("distillation.scenarios.is_right", is_right)
    kept = evaluation.right
    monkeypatch.setattr(
        evaluation, "right", lambda found, *more: kept([Completion(c.prompt, [*c.ids, 1], True) for c in found], *more)
    )


def run(folder: Path, name: str, *more: str) -> Path:
    asked = folder / "asked.jsonl"
    asked.write_text("".join(f'{{"prompt": "w{i} w9", "answer": "w{i}"}}\n' for i in range(5, 10)))
    words = arguments(folder, *SMALL, f"--eval-sets={asked}", f"--output-dir={folder / name}", *more)
    assert program.main(words) == 0
    return folder / name


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["models"]


def options(folder: Path, *more: str) -> Any:
    return parse_options(arguments(folder, *more))


def test_figures_depend_on_nothing_but_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the size of a batch, nor on an evaluation between steps, which leaves the training alone."""
    writers: list[tuple[Any, list[list[int]]]] = []

    def sampled(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> Any:
        if more["max_new_tokens"] == 12:
            writers.append((model, prompts))
        return sample(model, tokenizer, prompts, **more)

    monkeypatch.setattr(answering, "sample", sampled)
    alone = run(tmp_path, "alone")
    # The teacher on both, the students where there are answers; a prompt's samples beside each other.
    assert [len(prompts) for _, prompts in writers] == [6, 10, 10, 10]
    assert all(prompts == [[i, 9] for i in range(5, 10) for _ in range(2)] for _, prompts in writers[1:])
    writers.clear()
    often = run(tmp_path, "often", "--eval-steps=1", "--evaluation-batch-size=3")
    assert len({id(model) for model, _ in writers[:6]}) == 1  # the teacher, and never again
    assert [len(prompts) for _, prompts in writers] == [3, 3, *[3, 3, 3, 1] * 5]
    weights = [(folder / "student-entropy-aware" / "model.safetensors").read_bytes() for folder in (alone, often)]
    assert weights[0] == weights[1]
    found, expected = rows(often), rows(alone)
    assert [(row["name"], row["set"]) for row in found] == [
        (name, one) for name in ("teacher", "student at start", "entropy-aware") for one in ("held-out", "asked")
    ]
    for one, other in zip(found, expected, strict=True):
        assert one["correct"] == other["correct"]
        assert one["agreement"] == pytest.approx(other["agreement"], rel=1e-5, abs=1e-6)
    matrices = [row["correct"] for row in found if row["set"] == "asked"]
    assert all(len(matrix) == 5 and {0, 1} == {one for outcomes in matrix for one in outcomes} for matrix in matrices)
    between = lines(often, "evaluations.jsonl")
    assert [line["step"] for line in between] == [1, 2]  # of the last one the results tell
    # At step 1 the learning rate is 0: the student is still the one at the start.
    assert between[0]["asked/pass@1"] == pytest.approx(sum(map(sum, matrices[1])) / 10)
    start = found[2]["agreement"]["forward_kl_uncertain"]
    assert between[0]["held-out/forward_kl_uncertain"] == pytest.approx(start, rel=1e-5)
    assert between[1]["held-out/forward_kl_uncertain"] != pytest.approx(start, rel=1e-3)
    state = json.loads((often / "checkpoints/entropy-aware/checkpoint-3/trainer_state.json").read_text())
    told = [entry["eval_asked/pass@1"] for entry in state["log_history"] if "eval_asked/pass@1" in entry]
    assert told == [line["asked/pass@1"] for line in between]
    assert "asked: Pass@1" in (often / "report.html").read_text()


def test_an_interrupted_evaluation_goes_on_at_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, "run")
    whole = (folder / "results.json").read_text()
    content = json.loads(whole)
    del content["models"][5:]
    (folder / "results.json").write_text(json.dumps(content))
    done: list[tuple[str, str]] = []
    evaluated = evaluation.Results.evaluated

    def listened(self: Any, name: str, model: Any, label: str, *more: Any) -> Any:
        done.append((label, name))
        return evaluated(self, name, model, label, *more)

    monkeypatch.setattr(evaluation.Results, "evaluated", listened)
    assert program.main(["--resume", str(folder)]) == 0
    assert (folder / "results.json").read_text() == whole and done == [("entropy-aware", "asked")]


def test_what_it_costs_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "WORTH_SAYING", 0.0)
    monkeypatch.setattr("distillation.evaluation.time.perf_counter", iter(range(0, 10**6, 60)).__next__)
    run(tmp_path, "run", "--eval-steps=2", "--evaluation-batch-size=2")
    out = capsys.readouterr().out
    # 3 prompts without answers, which the teacher alone samples, and 5 with answers; one evaluation between the steps.
    assert "3 (held-out) + 5 (asked) prompts × 2 samples × 12 tokens are at most 192;\n" in out
    assert f"the teacher once and a student 3 times sample at most {192 + 3 * 120:,}\n" in out
    assert out.index("at most 192") < out.index("distilling with")
    # A first batch of one minute, as long as allowed or nearly, of three and of five.
    assert "  teacher, held-out: at most 3 min, by the speed of the first batch" in out
    assert "  student at start, asked: at most 5 min, by the speed of the first batch" in out


def test_sets_have_names_and_the_hubs_have_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def loaded(name: str, configuration: Any = None, split: str = "", **more: Any) -> Any:
        asked.append((name, configuration, split))
        return [{"problem": "w5", "question": "w6", "prompt": "w7", "answer": 7}]

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    file = tmp_path / "own.jsonl"
    file.write_text('{"problem": "w8", "prompt": "w9", "reply": "3", "answer": "4"}\n')
    words = ["MATH-500", "AIME-2024", "AIME-2025", "AMC23", "a/b:c", f"other={file}", str(file)]
    given = options(tmp_path, "--eval-sets", *words, "--answer-column=reply", "--prompt-suffix= w3", "--eval-prompts=0")
    found = {name: (its, rows) for name, its, rows in evaluation_sets(given)}
    assert list(found) == [*HUB_SETS, "a/b:c", "other", "own"]
    assert asked == [
        *((name, None, split) for name, split, _ in HUB_SETS.values()),
        ("a/b", "c", "test"),
    ]
    columns = {name: (its.prompt_column, its.answer_column) for name, (its, _) in found.items()}
    assert columns["MATH-500"] == columns["AIME-2024"] == columns["AIME-2025"] == ("problem", "answer")
    assert columns["AMC23"] == ("question", "answer") and columns["other"] == columns["own"] == (None, "reply")
    ((_, row),) = found["own"][1]
    assert row["reply"] == "3" and found["own"][0].prompt_suffix == " w3"
    given = options(tmp_path, "--eval-sets", f"MATH-500={file}", "--answer-column=reply", "--eval-prompt-suffix= w4")
    ((name, its, _),) = evaluation_sets(given)
    assert (name, its.prompt_column, its.answer_column, its.prompt_suffix) == ("MATH-500", "problem", "answer", " w4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}", "{file}"], "'own' is the name of two sets"),
        (["held-out={file}"], "'held-out' is the name of two sets"),
        (
            ["none.jsonl"],
            "No such file or directory: 'none.jsonl'; none=FILE reads it from a file",
        ),
    ],
)
def test_sets_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "w9"}\n')
    given = options(tmp_path, "--eval-sets", *(word.format(file=file) for word in words))
    with pytest.raises(UsageError, match=r"argument --eval-sets: ") as refused:
        list(evaluation_sets(given))
    assert message in str(refused.value)


def test_no_prompt_is_held_out_where_there_is_another_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"argument --eval-prompts: 0 is not an integer of at least 1"):
        options(tmp_path, "--eval-prompts=0")
    with pytest.raises(UsageError, match=r"argument --eval-sets: the demonstration has none"):
        parse_options(["--eval-sets", "MATH-500", "--use-cpu"])
    with pytest.raises(UsageError, match=r"argument --eval-steps: 0.5 is not an integer of at least 1"):
        options(tmp_path, "--eval-steps=0.5")
    folder = run(tmp_path, "run", "--eval-prompts=0", "--max-steps=1")
    assert [row["set"] for row in rows(folder)] == ["asked"] * 3


def test_pieces_are_the_text_of_each_token() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = bytewise("aé €!\n")["input_ids"]
    assert pieces(ids, bytewise) == ["a", "", "é", " ", "", "", "€", "!", "\n"]
    assert pieces(ids[:5], bytewise) == ["a", "", "é", " ", "\ufffd"]  # cut within a character
    words = tiny_tokenizer(tiny_words())
    assert pieces([5, 6, 1], words) == ["w5", " w6", " <eos>"] and pieces([], words) == []


def test_logged_tokens_have_their_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of completions in two micro-batches, each scored alone before the step."""
    expected: list[Any] = []
    given = OnPolicyTrainer.training_step

    def scored(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        if self.state.global_step == 0 and not self.per_token:
            for one in self.completions[:3]:
                batch = collate([one], PAD, torch.device("cpu"))
                with torch.no_grad():
                    seen = score(self.student, self.teacher, batch, self.distillation_objective)
                expected.append((one, [getattr(seen, name)[0].tolist() for name in PER_TOKEN]))
        return given(self, model, inputs, *more)

    monkeypatch.setattr(OnPolicyTrainer, "training_step", scored)
    folder = run(tmp_path, "run", "--max-steps=1")
    logged = lines(folder, "completions.jsonl")
    assert len(logged) == len(expected) == 3
    gates = set()
    for line, (completion, figures) in zip(logged, expected, strict=True):
        assert len(line["tokens"]) == len(line["figures"]) == len(completion.ids)
        for place in range(len(PER_TOKEN)):
            assert [row[place] for row in line["figures"]] == pytest.approx(figures[place], abs=1e-3)
        gates |= {row[3] for row in line["figures"]}
        text = "".join(line["tokens"])
        assert text.removesuffix(" <eos>") == line["completion"]
    assert gates == {0.0, 1.0}
