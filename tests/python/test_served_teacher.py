"""A teacher behind a server: what it hands out is the model's own, what is no such thing is refused by name, and a run
with it is a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation import served_teacher
from distillation.errors import RunError, UsageError
from distillation.evaluation import agreement, compared
from distillation.metrics import StepTotals
from distillation.models import hidden_states
from distillation.prompts import Prompt
from distillation.rollouts import Completion, Rollouts, collate, sample
from distillation.served_teacher import ServedTeacher
from distillation.stream import Draw
from distillation.training import score

from eopd_kernels import Objective, TopK, TopKTeacher, entropy_aware_kl

from .conftest import EOS, PAD, tiny_model, tiny_tokenizer, tiny_words
from .served_model import ServedModel
from .small_run import arguments, comparable, lines
from .test_distill_resume import outcome

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TAILED = Objective(reverse="sampled", forward=TopK(teacher="raw", tail=True), gate="always")
Serve = Callable[..., ServedModel]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_teacher, "PAUSES", (0.01, 0.02))


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[ServedModel] = []

    def begin(model: Any = None, words: list[str] | None = None, **options: Any) -> ServedModel:
        server = ServedModel(model or tiny_model("llama"), tiny_tokenizer(words or tiny_words()), **options)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def teacher_at(server: ServedModel, k: int = 8, timeout: float = 120.0) -> ServedTeacher:
    return ServedTeacher(server.url, k=k, timeout=timeout, device=CPU)


def drawn(student: Any) -> Rollouts:
    """Completions of several lengths after prompts of several lengths."""
    prompts = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
    rollouts = sample(student, tiny_tokenizer(tiny_words()), prompts, max_new_tokens=6)
    cut = [replace(one, ids=one.ids[: 2 + i]) for i, one in enumerate(rollouts.sequences([EOS]))]
    return collate([replace(one, log_probs=(one.log_probs or [])[: len(one.ids)]) for one in cut], PAD, CPU)


def logits_of(model: Any, rollouts: Rollouts) -> torch.Tensor:
    """Of each completion token, [B, C, V]."""
    hidden = hidden_states(model, rollouts.input_ids, rollouts.attention_mask)[:, rollouts.prompt_width - 1 : -1]
    return hidden @ model.get_output_embeddings().weight.t()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("objective", [Objective.eopd_paper(), TAILED], ids=["paper", "tail"])
def test_what_is_served_is_what_the_model_has(objective: Objective, engine: str, serve: Serve) -> None:
    student, model = tiny_model("llama"), tiny_model("llama")
    rollouts = drawn(student)
    teacher = teacher_at(serve(model, engine=engine))
    with torch.no_grad():
        log_q = logits_of(model, rollouts).log_softmax(-1)
    log_probs, ids = log_q.topk(8)
    of_token = log_q.gather(-1, rollouts.completion_ids[..., None])[..., 0]
    known = TopKTeacher(ids, log_probs, token_log_probs=of_token)
    expected = entropy_aware_kl(
        logits_of(student, rollouts),
        known,
        mask=rollouts.completion_mask,
        objective=objective,
        token_ids=rollouts.completion_ids,
        old_log_probs=rollouts.log_probs,
    )
    seen = score(student, teacher, rollouts, objective)
    torch.testing.assert_close(seen.loss, expected.loss)
    assert expected.loss > 1 and seen.teacher_entropy_is_lower_bound
    served, mask = teacher(rollouts), rollouts.completion_mask
    assert torch.equal(served.ids[mask], ids[mask])
    torch.testing.assert_close(served.log_probs[mask], log_probs[mask])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_of_the_student_itself_has_no_loss(engine: str, serve: Serve) -> None:
    student = tiny_model("llama")
    rollouts = drawn(student)
    seen = score(student, teacher_at(serve(student, engine=engine)), rollouts, TAILED)
    assert abs(seen.loss.item()) < 1e-5 and seen.forward_half.max() < 1e-5
    teacher, totals = teacher_at(serve(student, engine=engine)), StepTotals(1.5, 40, CPU)
    seen = score(student, teacher, rollouts, compared(teacher))
    totals.add_tokens(seen, seen.loss, rollouts.completion_mask)
    found = agreement(totals, totals.sums)
    assert found["tokens"] == rollouts.completion_mask.sum()
    assert 0 < (found["teacher_entropy_uncertain"] or 0) <= (found["student_entropy_uncertain"] or 0) + 1e-5
    for name in ("forward_kl_uncertain", "forward_kl_certain"):
        assert abs(found[name] or 0) < 1e-5


def test_a_step_is_asked_for_at_once_and_each_sequence_once(serve: Serve) -> None:
    student, server = tiny_model("llama"), serve()
    teacher, rollouts = teacher_at(server), drawn(student)
    completions = rollouts.sequences([])
    teacher.ask([*completions, *completions])
    for one in completions:
        teacher(collate([one], PAD, CPU))
    scored = [asked["prompt"] for path, asked in server.asked if path == "/v1/completions"]
    assert sorted(scored) == sorted([*one.prompt, *one.ids] for one in completions)


def test_the_servers_own_samples_end_where_the_students_do(serve: Serve) -> None:
    for engine in ("vllm", "sglang"):
        server = serve(engine=engine)
        teacher = teacher_at(server)
        teacher.eos_ids = [EOS, 5]
        options: dict[str, Any] = {"seed": 3, "max_new_tokens": 20, "vocab_size": 40, "top_p": 0.9}
        draws = [Draw(number, Prompt(ids, "")) for number, ids in enumerate([[3, 4], [6]] * 8)]
        found = teacher.sample(draws, **options)
        assert [one.prompt for one in found] == [[3, 4], [6]] * 8
        assert {one.ended for one in found} == {True, False} and len({tuple(one.ids) for one in found}) > 8
        assert all(one.ids[-1] in (EOS, 5) or len(one.ids) == 20 for one in found)
        asked = [asked.get("sampling_params", asked) for path, asked in server.asked if path != "/v1/models"]
        expected = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert all({key: one[key] for key in expected} == expected for one in asked)
        assert len({one.get("seed", one.get("sampling_seed")) for one in asked}) == 16
        with pytest.raises(RunError, match="with ids that the student lacks"):
            teacher.sample(draws, **{**options, "vocab_size": 4})


FAILURES: list[Any] = [ValueError(503, "loading"), ValueError(429, "too many"), ValueError(500, "oops")]


def test_what_fails_for_a_while_is_asked_for_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    student, server = tiny_model("llama"), serve()
    teacher, [one, *_] = teacher_at(server), drawn(student).sequences([])
    failures = [*FAILURES, ConnectionResetError("gone")]  # a dropped connection: the handler's thread dies

    def fails(path: str, asked: Any, answer: Any) -> Any:
        if failures:
            raise failures.pop(0)
        return answer

    server.changed = fails
    monkeypatch.setattr(server, "handle_error", lambda *given: None)
    assert teacher(collate([one], PAD, CPU)).ids.shape == (1, 2, 8) and not failures
    assert len(server.asked) == 1 + 5


def test_what_fails_for_good_is_said_after_its_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    student, server = tiny_model("llama"), serve()
    rollouts = drawn(student)
    held = threading.Event()

    def broken(path: str, asked: Any, answer: Any) -> Any:
        raise FAILURES[0]

    def silent(path: str, asked: Any, answer: Any) -> Any:
        held.wait(5)
        return answer

    monkeypatch.setattr(served_teacher, "PAUSES", (200.0, 200.0))  # is longer than there is time
    for changed, message, timeout in ((broken, "503, .*loading", 120.0), (silent, "timed out", 0.3)):
        teacher = teacher_at(server)
        teacher.timeout, server.changed = timeout, changed
        with pytest.raises(
            RunError, match=f"{server.url}: /v1/completions does not answer: {message}.*for {timeout:g} s"
        ):
            teacher(rollouts)
        server.changed = lambda path, asked, answer: answer
    held.set()
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match=r"/v1/models does not answer: .*refused.*--teacher-timeout"):
        teacher_at(server)


def vllm(change: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    """Another answer of vLLM's, with rows as ``change`` makes them of the right ones."""

    def changed(path: str, asked: Any, answer: Any) -> Any:
        return {"choices": [{"prompt_logprobs": change(answer["choices"][0]["prompt_logprobs"])}]}

    return changed


def scaled(rows: list[Any]) -> list[Any]:
    return [row and {i: {**one, "logprob": -one["logprob"]} for i, one in row.items()} for row in rows]


REFUSED: list[tuple[str, Callable[..., Any], str]] = [
    (
        "vllm",
        vllm(lambda rows: [*rows[1:], rows[-1]]),
        "its rows are no log-probabilities about the tokens",
    ),  # each about the next
    (
        "vllm",
        vllm(lambda rows: [rows[0], *rows[:-1]]),
        "no log-probabilities of the prompt|rows are no log-probabilities about",
    ),
    ("vllm", vllm(lambda rows: rows[:-1]), "its rows are no log-probabilities about the tokens"),
    ("vllm", vllm(lambda rows: None), "no log-probabilities of the prompt as vllm has them"),
    ("vllm", lambda *given: {"choices": []}, "no log-probabilities of the prompt as vllm has them"),
    ("vllm", lambda *given: "<html>", "does not answer in JSON"),
    ("vllm", vllm(scaled), "its rows are no log-probabilities"),
    ("vllm", vllm(lambda rows: [row and dict([*row.items()][:1]) for row in rows]), "1 entries of a token, fewer"),
    ("sglang", lambda *given: {"meta_info": {}}, "no log-probabilities of the prompt as sglang has them"),
    ("sglang", lambda *given: [], "no log-probabilities of the prompt as sglang has them"),
]


@pytest.mark.parametrize(("engine", "changed", "message"), REFUSED)
def test_what_is_no_score_of_the_tokens_is_refused(
    engine: str, changed: Callable[..., Any], message: str, serve: Serve
) -> None:
    student, server = tiny_model("llama"), serve(engine=engine)
    teacher = teacher_at(server)
    server.changed = changed
    with pytest.raises(RunError, match=message):
        teacher(drawn(student))


def test_sglangs_rows_of_other_tokens_are_refused(serve: Serve) -> None:
    """Of SGLang the tokens stand beside the rows, which an answer from another start shifts together."""
    student, server = tiny_model("llama"), serve(engine="sglang")
    teacher = teacher_at(server)

    def shifted(path: str, asked: Any, answer: Any) -> Any:
        meta = answer["meta_info"]
        return {"meta_info": {name: [*rows[1:], rows[-1]] for name, rows in meta.items()}}

    server.changed = shifted
    with pytest.raises(RunError, match="its rows are no log-probabilities about the tokens"):
        teacher(drawn(student))


@pytest.mark.parametrize(
    "listed", ["hello", {"data": []}, {"object": "list"}, {"data": [{"id": "m", "owned_by": "llamacpp"}]}]
)
def test_another_server_is_none(listed: Any, serve: Serve) -> None:
    server = serve()
    server.changed = lambda *given: listed
    with pytest.raises(RunError, match=r"does not answer in JSON|is no server of vLLM or SGLang: /v1/models says"):
        teacher_at(server)


def test_more_entries_than_the_server_hands_out(serve: Serve) -> None:
    with pytest.raises(RunError, match=r"refuses: 400, .*max allowed: 20.*; vLLM needs --max-logprobs 30"):
        teacher_at(serve(), k=30)(drawn(tiny_model("llama")))


def test_vocabularies_that_differ_are_refused(serve: Serve) -> None:
    student, tokenizer, prompts = tiny_model("llama"), tiny_tokenizer(tiny_words()), [[3, 4, 5, 6], [7, 8]]
    assert teacher_at(serve()).share_vocabulary(student, tokenizer, prompts) == 40
    swapped = tiny_words()
    swapped[4], swapped[9] = swapped[9], swapped[4]
    with pytest.raises(UsageError, match="on 2 of 40 ids that were compared, first id 4: 'w4' for the student, 'w9'"):
        teacher_at(serve(words=swapped, max_logprobs=40), k=40).share_vocabulary(student, tokenizer, prompts)
    larger = serve(tiny_model("llama", vocab_size=60), tiny_words(60))
    with pytest.raises(UsageError, match=r"first id 4[0-9]: '' for the student, 'w4[0-9]' for the server"):
        teacher_at(larger, k=20).share_vocabulary(student, tokenizer, prompts)
    padded = teacher_at(serve(tiny_model("llama", vocab_size=60)), k=20)  # rows that no tokenizer names
    assert padded.share_vocabulary(student, tokenizer, prompts) == 40
    ids = padded(drawn(student)).ids
    assert ids.max() < 40 and (ids == -1).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--teacher=folder"],
            "argument --teacher-url: 'http://127.0.0.1:9' is not http://host:port, without --teacher",
        ),
        (["--teacher-url=localhost:8000"], "argument --teacher-url: 'localhost:8000' is not http://host:port"),
        (["--teacher-timeout=0"], "argument --teacher-timeout: 0.0 is not a number above 0"),
        (["--off-policy-fraction=0.5", "--objective=paper"], "argument --off-policy-fraction: 0.5 is not 0, and"),
        (
            ["--objective=entropy-aware"],
            "argument --objective: 'entropy-aware' is not made of what --teacher-url hands",
        ),
        (
            ["--objective={reverse: none, forward: top_k, temperature: [1.0, 2.0]}"],
            "'own' is not made of what",
        ),
        (
            ["--objective={forward: {k: 4}, reverse: {k: 4, of: student, student: renormalized}}"],
            "'own' is not made of what",
        ),
        (["--student=nowhere/at/all"], "is no folder here"),
    ],
)
def test_what_it_cannot_be_asked_for_is_refused_before_it_is_asked(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*served_arguments(tmp_path, "http://127.0.0.1:9"), *words, f"--output-dir={tmp_path / 'run'}"]
    capsys.readouterr()
    assert program.main(given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "run").exists()


def served_arguments(folder: Path, url: str, *more: str) -> list[str]:
    """As :func:`arguments` has them, with a teacher at ``url``."""
    given = [word for word in arguments(folder) if not word.startswith("--teacher=")]
    return [*given, f"--teacher-url={url}", "--objective=paper", *more]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the models of a small run, and the address at which another process serves the teacher there."""
    folder = tmp_path_factory.mktemp("served")
    arguments(folder)
    command = [sys.executable, "-m", "tests.python.served_model", str(folder / "teacher")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as server:
        assert server.stdout is not None
        yield folder, server.stdout.readline().strip()
        server.kill()


def test_a_run_with_a_served_teacher_is_the_run_with_that_teacher_here(
    process: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the figures that twelve of forty entries do not tell."""
    folder, url = process
    gate = "gate: always, reverse: sampled, forward: {k: 12, teacher: raw, tail: true}"
    words = ["--max-steps=2", "--tau=2.4", f"--objective={{name: tail, {gate}}}"]
    assert program.main([*served_arguments(folder, url), *words, f"--output-dir={folder / 'served'}"]) == 0
    out = capsys.readouterr().out
    assert f"vllm at {url} has the same text for" in out and "teacher: served; student: Llama" in out
    assert "\n  teacher" in out and "teacher's own samples; nan" not in out
    assert program.main([*arguments(folder), *words, f"--output-dir={folder / 'here'}"]) == 0
    for served, here in zip(lines(folder / "served"), lines(folder / "here"), strict=True):
        assert served["loss"] == pytest.approx(here["loss"], rel=1e-4) and served["tokens"] == here["tokens"]
        assert served["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-4)
        assert served["student_entropy"] == pytest.approx(here["student_entropy"], rel=1e-4)
        assert 0 < served["teacher_entropy"] < here["teacher_entropy"]
        assert 0 < served["forward_kl"] < here["forward_kl"]
        assert math.isfinite(served["reverse_kl"])
    rows = json.loads((folder / "served" / "results.json").read_text())["models"]
    assert [row["name"] for row in rows] == ["teacher", "student at start", "tail"]
    assert rows[0]["agreement"] == {} and rows[1]["agreement"]["forward_kl_certain"] > 0
    assert (folder / "served" / "report.html").exists()


def test_a_run_that_lost_its_server_goes_on_as_if_nothing_had_happened(
    process: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, url = process
    words = served_arguments(folder, url, "--teacher-timeout=150", "--rollout-prompts=32", "--tau=2.4")
    assert program.main([*words, f"--output-dir={folder / 'whole'}"]) == 0
    ask, steps = ServedTeacher.ask, list[int]()

    def lost(teacher: ServedTeacher, completions: list[Completion]) -> None:
        assert steps or teacher.timeout == 150
        steps.append(len(completions))
        if steps.count(8) == 4:  # evaluations ask for other numbers
            teacher.url, teacher.timeout = "http://127.0.0.1:9", 0.2
        ask(teacher, completions)

    monkeypatch.setattr(ServedTeacher, "ask", lost)
    assert program.main([*words, f"--output-dir={folder / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert "/v1/completions does not answer: " in error and "refused; asked for 0.2 s (--teacher-timeout)" in error
    assert len(error.splitlines()) == 1 and len(lines(folder / "run")) == 3
    monkeypatch.undo()
    assert program.main(["--resume", str(folder / "run")]) == 0
    assert outcome(folder / "run") == outcome(folder / "whole")
    assert [comparable(one)["step"] for one in lines(folder / "run")] == [1, 2, 3, 4, 5, 6]
