"""The short training script: it runs, it samples and counts what it should, and README shows its heart."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import train_minimal
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from eopd_kernels import EntropyAwareKLLoss, EntropyGate, Objective

from .conftest import EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words

FILE = Path(train_minimal.__file__)
README = FILE.parents[1] / "README.md"
LINE = re.compile(
    r"step (\d+): loss ([\d.]+), reverse KL ([\d.]+), forward KL ([\d.]+), H_t ([\d.]+) nats, gate (\d+)%, "
    r"\d+ tokens/s, peak memory \d+ MiB"
)
ENDS = [EOS, *range(7, 16)]  # so many that some completions end
SAMPLING = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=5, eos_token_id=ENDS, pad_token_id=PAD)
TAU = 2.9  # in the middle of these teachers' entropies


class Kept(torch.optim.Optimizer):
    """Counts the steps and leaves parameters and gradients as they are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1


def naive(student: PreTrainedModel, teacher: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """The loss by its definition, from logits of one unpadded sequence at a time; float64."""
    losses = []
    for prompt, answer in sequences:
        ids = torch.tensor([prompt + answer])
        of_answer = slice(len(prompt) - 1, -1)
        log_p = student(ids).logits[0, of_answer].double().log_softmax(-1)
        log_q = teacher(ids).logits[0, of_answer].double().log_softmax(-1)
        gate = (-(log_q.exp() * log_q).sum(-1) > TAU).double()
        forward, reverse = log_q.exp() * (log_q - log_p), log_p.exp() * (log_p - log_q)
        losses.append(reverse.sum(-1) + gate * forward.sum(-1))
    return torch.cat(losses).mean()


# Positions are absolute, relative, and no argument of the model's at all; gemma2 has a softcap.
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "gemma2"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_loss_and_gradient_are_those_of_a_naive_computation(kind: str, micro_batch: int) -> None:
    student, teacher = tiny_model(kind), tiny_model("gpt2").requires_grad_(False)
    tokenizer = tiny_tokenizer(tiny_words())
    texts = ["w3 w4 w7 w5 w6", "w8", "w9 w10 w11", "w12 w7"] * 2  # some of which end a completion, but no prompt
    prompts = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    generate, drawn = cast(Any, student.generate), []

    def recorded(**given: Any) -> Tensor:
        drawn.append(generate(**given))
        return drawn[0]

    vars(student)["generate"] = recorded
    optimizer = Kept(student.parameters())
    loss = EntropyAwareKLLoss(Objective(gate=EntropyGate(TAU)))
    total, reverse_kl, forward_kl, entropy, gate, tokens = train_minimal.train_step(
        student, teacher, loss, optimizer, prompts, SAMPLING, micro_batch
    )
    sequences = []
    for text, ids in zip(texts, drawn[0][:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((i for i, token in enumerate(ids) if token in ENDS), len(ids) - 1)
        sequences.append((tokenizer(text)["input_ids"], ids[: end + 1]))
    assert len({len(answer) for _, answer in sequences}) > 1 and tokens == sum(len(answer) for _, answer in sequences)
    expected = naive(student, teacher, sequences)
    assert total == pytest.approx(expected.item(), rel=1e-4) and 0 < gate < 1 and optimizer.steps == 1
    assert reverse_kl < total < reverse_kl + forward_kl and 0 < entropy < torch.tensor(float(VOCABULARY)).log()
    used = [parameter for parameter in student.parameters() if parameter.grad is not None]
    for parameter, gradient in zip(used, torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_it_runs_without_arguments_and_learns(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FILE.parents[1])}
    run = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    found = [LINE.fullmatch(line) for line in run.stdout.splitlines()]
    assert len(found) == 40 and all(found) and not list(tmp_path.iterdir())
    losses = [float(match[2]) for match in found if match]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert all(0 < int(match[6]) < 100 for match in found if match)


def test_own_models_and_prompts(
    tmp_path: Path, saved_model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = saved_model("teacher", "llama", tiny_words())
    student = saved_model("student", "gpt2", tiny_words(VOCABULARY + 8), vocab_size=VOCABULARY + 8)
    narrow = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, eos_token_id=5)
    narrow.save_pretrained(student)
    (tmp_path / "prompts.txt").write_text("w3 w4 w5\n\nw6\nw7 w8\n")
    words = [f"--teacher={teacher}", f"--student={student}", f"--prompts={tmp_path / 'prompts.txt'}", "--steps=2"]
    train_minimal.main([*words, "--batch-size=4", "--micro-batch=2", f"--output={tmp_path / 'out'}"])
    assert [match and match[1] for match in map(LINE.fullmatch, capsys.readouterr().out.splitlines())] == ["1", "2"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (student, tmp_path / "out"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert after.generation_config.top_k == 1 and after.generation_config.eos_token_id == 5  # its own again


def test_samples_come_from_the_students_whole_distribution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever its generation_config says, but for ids that the teacher does not have; either's end ends it."""
    student, teacher = tiny_model("llama", vocab_size=VOCABULARY + 20), tiny_model("gpt2")
    student.get_output_embeddings().weight.data.mul_(0.01)  # next to uniform
    student.generation_config = GenerationConfig(top_k=1, repetition_penalty=9.0, temperature=0.1, eos_token_id=[5, 6])
    tokenizer, seen = tiny_tokenizer(tiny_words()), []

    def drawn(*given: Any) -> list[float]:
        assert given[5].eos_token_id == [EOS, 5, 6]
        seen.append(given[0].generate(**given[4], generation_config=given[5])[:, -1])
        return [0.0] * 6

    monkeypatch.setattr(train_minimal, "train_step", drawn)
    monkeypatch.setattr(train_minimal, "tiny", lambda: (teacher, student, tokenizer, ["w3"]))
    train_minimal.main(["--steps=1", "--batch-size=4000", "--max-new-tokens=1"])
    assert seen[0].unique().tolist() == list(range(VOCABULARY))


@pytest.mark.parametrize(("missing", "words"), [("--prompts", ["--teacher=a", "--student=b"]), ("", ["--steps=x"])])
def test_bad_arguments_end_it(missing: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_minimal.main(words)
    assert missing in capsys.readouterr().err


def test_tokenizers_that_disagree_are_refused(
    tmp_path: Path, saved_model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words()
    teacher, student = saved_model("a", "llama", [*words[:30], *reversed(words[30:])]), saved_model("b", "llama", words)
    with pytest.raises(SystemExit, match="2"):
        train_minimal.main([f"--teacher={teacher}", f"--student={student}", f"--prompts={tmp_path / 'none.txt'}"])
    assert "give 10 tokens different ids" in capsys.readouterr().err


def test_it_is_short_and_stands_alone() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) <= 120
    imported = [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported and not any("distill" in line for line in imported)


def test_readmes_first_code_is_its_heart() -> None:
    """The lines from ``generate`` to ``step`` are the script's, in its order, and they run."""
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    shown = block.splitlines()
    heart = shown[next(i for i, line in enumerate(shown) if "generate(" in line) :]
    assert heart[-1] == "optimizer.step()" and len(heart) == 15
    ours = iter(line.strip() for line in FILE.read_text().splitlines())
    assert all(line.strip() in ours for line in heart)  # a subsequence: the script has its figures in between
    student, teacher = tiny_model("llama"), tiny_model("llama").requires_grad_(False)
    before = [parameter.clone() for parameter in student.parameters()]
    given: dict[str, Any] = {"student": student, "teacher": teacher, "texts": ["w3 w4", "w5"], "torch": torch}
    given["tokenizer"] = tiny_tokenizer(tiny_words())
    exec(block, given)
    assert given["out"].loss.item() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
