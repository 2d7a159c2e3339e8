"""What smaller machines need: an adapter as the student, a quantised teacher, 8-bit Adam, a device without float64."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation import answering, models
from distillation.command_line import parse_options
from distillation.options import ModelOptions
from distillation.rollouts import sample
from distillation.scenarios import load_student
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from eopd_kernels.testing.pretend import WithoutFp64

from .conftest import tiny_model, tiny_tokenizer, tiny_words
from .small_run import arguments, lines

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = ("--max-steps=2", "--warmup-steps=0", "--eval-prompts=2")


def adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    found = PeftModel.from_pretrained(base, folder / name).state_dict()
    return {key: value for key, value in found.items() if "lora_" in key}


def test_an_adapter_is_trained_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Completions are drawn under the autocast of the loss: peft's generate goes around accelerate."""
    drawn_so, draw = [], sample

    def listened(*given: Any, **options: Any) -> Any:
        drawn_so.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return draw(*given, **options)

    monkeypatch.setattr(answering, "sample", listened)
    words = arguments(tmp_path, *SHORT, "--objective=paper", "--bf16")
    assert program.main([*words, "--lora-r=3", f"--output-dir={tmp_path / 'run'}"]) == 0
    assert [dtype for dtype in drawn_so if dtype] == [torch.bfloat16] * 2  # not the evaluation
    assert "of which 0.00 M are trained" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "student-paper" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(tmp_path / "student"))
    first = adapter(tmp_path, "run/student-paper")
    assert len(first) == 14 and all(value.any() and value.dtype == torch.float32 for value in first.values())
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert rows[1]["agreement"] != rows[2]["agreement"]

    again = [*words, f"--student={tmp_path / 'run' / 'student-paper'}", "--student-dtype=bfloat16"]
    assert program.main([*again, f"--output-dir={tmp_path / 'again'}"]) == 0
    second = adapter(tmp_path, "again/student-paper")
    assert second.keys() == first.keys()
    assert all(0 < (second[key] - first[key]).abs().max() < 0.1 for key in first)
    monkeypatch.setattr(program, "imported", lambda: None)
    assert program.main([*again, "--rollout-engine=vllm", f"--output-dir={tmp_path / 'engine'}"]) == 2
    assert "vllm is handed whole weights" in capsys.readouterr().err


def test_an_adapter_is_sampled_from_as_it_is() -> None:
    """Not by the generation config of the model inside, which may have a top-p."""
    prompts = [[5, 6, 7], [9]]
    options: dict[str, Any] = {"max_new_tokens": 8, "numbers": torch.linspace(0.05, 0.95, 16).view(2, 8)}
    expected = sample(tiny_model("llama"), tiny_tokenizer(tiny_words()), prompts, **options)
    for task in (None, "CAUSAL_LM"):
        torch.manual_seed(0)
        student = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", task_type=task))
        student.get_base_model().generation_config.update(do_sample=True, top_k=1, repetition_penalty=9.0)
        found = sample(student, tiny_tokenizer(tiny_words()), prompts, **options)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert student.get_base_model().generation_config.top_k == 1


def test_a_new_adapter_is_the_same_for_one_seed(tmp_path: Path) -> None:
    def drawn(seed: int) -> torch.Tensor:
        options = parse_options(arguments(tmp_path, "--lora-r=2", f"--seed={seed}"))
        found = load_student(options, str(options.models.student), torch.device("cpu")).state_dict()
        return next(value for key, value in found.items() if "lora_A" in key)

    first = drawn(0)
    torch.rand(3)
    assert torch.equal(drawn(0), first) and not torch.allclose(drawn(1), first)


@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "torchao-int8", "bitsandbytes-4bit"])
def test_a_quantised_teacher(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its library is not installed: that the teacher, and no other, is asked for it."""
    library, asked = kind.split("-")[0], []
    there = importlib.util.find_spec(library) is not None
    load, find_spec = AutoModelForCausalLM.from_pretrained, importlib.util.find_spec

    def loaded(name: str, **options: Any) -> Any:
        asked.append((Path(name).name, options.get("quantization_config")))
        return load(name, **options) if there else load(name, **{k: v for k, v in options.items() if k not in UNKNOWN})

    UNKNOWN = ("quantization_config", "device_map")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    if not there:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == library or find_spec(name))
        monkeypatch.setattr(models, "quantized", lambda kind: kind)
    torch.manual_seed(0)  # the 4-bit products of bitsandbytes want multiples of 32
    tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer(tiny_words()).save_pretrained(tmp_path / "teacher")
    words = arguments(tmp_path, *SHORT, "--max-steps=1", f"--teacher-quantization={kind}")
    assert program.main([*words, f"--output-dir={tmp_path / 'run'}"]) == 0
    assert {name for name, how in asked if how is not None} == {"teacher"} and len(lines(tmp_path / "run")) == 1
    assert ModelOptions(teacher_quantization=kind).teacher_quantization == kind  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_eight_bit_adam(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}[name])
    words = arguments(tmp_path, *SHORT, f"--optim={name}")
    assert program.main([*words, f"--output-dir={tmp_path / 'run'}"]) == 0
    assert len(lines(tmp_path / "run")) == 2


class WithoutFp64OnTheDevice(WithoutFp64):
    """The numbers that decide are drawn on the host, whatever the device has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.rand, torch.ops.aten.stack):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_the_program_needs_no_float64(tmp_path: Path) -> None:
    words = arguments(tmp_path, *SHORT, "--objective=paper", "--rollout-prompts=16", "--off-policy-fraction=0.3")
    with WithoutFp64OnTheDevice():
        assert program.main([*words, f"--output-dir={tmp_path / 'without'}"]) == 0
    assert program.main([*words, f"--output-dir={tmp_path / 'with'}"]) == 0
    for one, other in zip(lines(tmp_path / "without"), lines(tmp_path / "with"), strict=True):
        for figure in ("loss", "reverse_kl", "teacher_entropy", "gate_fraction", "tokens"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-4)
