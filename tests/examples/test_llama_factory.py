"""LLaMA-Factory's own training by the example, against the specification of each sequence by itself."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, reference
from tests.integrations.conftest import in_a_folder_of_its_own, tiny_pair, tokenizer

from .test_examples import FOLDER

__all__ = ["in_a_folder_of_its_own"]  # a fixture, which takes effect by being here

OBJECTIVE = Objective(gate=EntropyGate(1.0))  # the example's
SEQUENCES = [  # prompt and answer, of very different lengths
    ([3 + (7 * i + j) % 37 for j in range(2 + i % 3)], [3 + (5 * i + 3 * j) % 37 for j in range(1 + 2 * (i % 4))])
    for i in range(8)
]
TRAINING = {
    **{"model_name_or_path": "student", "ref_model": "teacher", "output_dir": "out"},
    **{"stage": "sft", "do_train": True, "finetuning_type": "full"},
    **{"dataset_dir": ".", "dataset": "tiny", "template": "empty", "cutoff_len": 32},
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "logging_steps": 1},
    **{"learning_rate": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True},
}


@pytest.fixture(autouse=True)
def models() -> tuple[Any, Any]:
    """Student and teacher, which lie beside the data in the folder of the test."""
    if importlib.util.find_spec("llamafactory") is None:
        pytest.skip("llamafactory is not installed")
    pair = tiny_pair()
    with torch.no_grad():
        pair[1].get_output_embeddings().weight.mul_(4)  # entropies on both sides of the threshold
    for name, model in zip(("student", "teacher"), pair, strict=True):
        model.save_pretrained(name)
        tokenizer().save_pretrained(name)
    rows = [[" ".join(f"w{token}" for token in part) for part in parts] for parts in SEQUENCES]
    data = [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in rows]
    Path("tiny.json").write_text(json.dumps(data))
    Path("dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    return pair


def train(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[dict[str, float]]:
    """The lines of the log of a run from the command line."""
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow

    for module, name in ((tuner, "run_sft"), (workflow, "CustomSeq2SeqTrainer")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    Path("train.yaml").write_text(yaml.safe_dump({**TRAINING, **changes}))
    monkeypatch.setattr(sys, "argv", ["llama_factory.py", "train.yaml"])
    runpy.run_path(str(FOLDER / "llama_factory.py"), run_name="__main__")
    lines: list[dict[str, float]] = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    return lines


def expected_loss(student: Any, teacher: Any) -> tuple[Tensor, dict[str, float]]:
    """The mean over all tokens of the answers, in fp64, and the means of the figures."""
    both: list[list[Tensor]] = [[], []]
    for prompt, answer in SEQUENCES:
        for logits, model in zip(both, (student, teacher), strict=True):
            logits.append(model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double())
    out = reference.entropy_aware_kl(torch.cat(both[0]), torch.cat(both[1]).detach(), objective=OBJECTIVE)
    figures = {name: getattr(out, name).mean().item() for name in ("teacher_entropy", "reverse_kl", "gate")}
    return out.loss, figures


def check_first_line(line: dict[str, float], student: Any, teacher: Any) -> None:
    loss, figures = expected_loss(student, teacher)
    loss.backward()
    squares = [parameter.grad.square().sum() for parameter in student.parameters() if parameter.grad is not None]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
    assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert 0 < figures["gate"] < 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        # All sequences in three rows of 32, with a mask that keeps them apart.
        {"neat_packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ],
    ids=["padded", "one by one", "packed"],
)
def test_the_first_step_is_that_of_the_specification(
    options: dict[str, Any], models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_first_line(train(monkeypatch, **options)[0], *models)


@pytest.mark.parametrize("target", ["q_proj,v_proj", "q_proj,lm_head"])
def test_an_adapter_is_seen_and_trained_alone(
    target: str, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = models
    shape = LoraConfig(target_modules=target.split(","), r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_pair()[0], shape).save_pretrained("adapter")
    options = {"finetuning_type": "lora", "adapter_name_or_path": "adapter", "lora_target": target}
    adapted = PeftModel.from_pretrained(student, "adapter", is_trainable=True)
    check_first_line(train(monkeypatch, **options)[0], adapted, teacher)


def test_the_teacher_of_packed_rows_is_under_autocast_too(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their mask has the dtype of autocast, which a teacher in fp32 refuses."""
    packed = {"neat_packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    line = train(monkeypatch, bf16=True, **packed)[0]
    assert line["loss"] == pytest.approx(expected_loss(*models)[0].item(), rel=1e-2)


def test_the_loss_falls_and_a_new_adapter_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_steps": 20, "learning_rate": 0.05, "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4}
    losses = [line["loss"] for line in train(monkeypatch, **options) if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    assert Path("out/adapter_model.safetensors").exists()


def test_an_evaluation_has_the_same_loss_and_their_accuracy(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, do_eval=True, eval_dataset="tiny", compute_accuracy=True, per_device_eval_batch_size=8)
    found = json.loads(Path("out/all_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(expected_loss(*models)[0].item(), rel=1e-5)
    shares = []
    for prompt, answer in SEQUENCES:
        logits = models[0](input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        shares.append((logits.argmax(-1) == torch.tensor(answer)).double().mean().item())
    assert found["eval_accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_without_a_teacher_it_says_which_option_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ref_model must name the teacher, got None"):
        train(monkeypatch, ref_model=None)
