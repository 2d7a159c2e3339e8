"""What ``--plan`` says beside the bytes that a small run takes, and which of configs/ fit where they say so."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import distill as program
import pytest
import torch
from distillation import plan, scenarios
from distillation.answering import SampledAnswers
from distillation.command_line import parse_options
from distillation.plan import GIB, activations, planned, room, shared_out, states
from distillation.trainer import OnPolicyTrainer
from transformers import AutoModelForCausalLM

from eopd_kernels.testing.pretend import PeakMemory

from .conftest import tiny_model, tiny_tokenizer, tiny_words
from .small_run import arguments

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


def bytes_of(words: list[str], prompt_tokens: int = 5, processes: int = 1) -> dict[str, dict[str, float]]:
    rows = planned(parse_options(words), CPU, processes, prompt_tokens)
    return {name: {phase: GIB * value for phase, value in of.items()} for name, of in rows}


@pytest.mark.parametrize("more", [("--bf16", "--activation-checkpointing"), ("--lora-r=3",)], ids=str)
def test_the_parts_are_what_a_run_takes(more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and states to the byte; the peaks of a pass and of a rollout within a quarter."""
    found: dict[str, float] = {}

    def measured(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(self: Any, *given: Any, **options: Any) -> Any:
            before = sum(p.grad.nbytes for p in self.student.parameters() if p.grad is not None)
            with PeakMemory() as memory:
                result = original(self, *given, **options)
            found[name] = max(found.get(name, 0), before + memory.peak)
            return result

        monkeypatch.setattr(owner, name, call)

    def look(trainer: OnPolicyTrainer, *given: Any) -> None:
        assert trainer.optimizer is not None
        learnt = [p for p in trainer.student.parameters() if p.requires_grad]
        tensors = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        trained.append(weakref.ref(trainer.student))
        found["teacher"] = sum(p.nbytes for p in trainer.teacher.parameters())
        found["student"] = sum(p.nbytes for p in trainer.student.parameters())
        found["gradients"] = sum(p.nbytes for p in learnt)
        found["optimizer"] = sum(t.nbytes for t in tensors if t.dim() > 0)
        finish_step(trainer, *given)

    def load(scenario: scenarios.Scenario, *given: Any) -> Any:
        assert all(student() is None for student in trained), "its optimizer is still there in the evaluation"
        return load_student(scenario, *given)

    trained: list[weakref.ref] = []
    finish_step, load_student = OnPolicyTrainer.finish_step, scenarios.Scenario.load_student
    monkeypatch.setattr(scenarios.Scenario, "load_student", load)
    measured(SampledAnswers, "__call__")
    measured(OnPolicyTrainer, "training_step")
    monkeypatch.setattr(OnPolicyTrainer, "finish_step", look)
    for name in ("teacher", "student"):  # large enough for what passes in an operation to be little beside it
        tiny_model("llama", hidden_size=64, intermediate_size=192, num_hidden_layers=3).save_pretrained(tmp_path / name)
        tiny_tokenizer(tiny_words()).save_pretrained(tmp_path / name)
    words = arguments(tmp_path, "--max-steps=1", "--max-new-tokens=40", "--warmup-steps=0", "--eval-prompts=1", *more)
    need = bytes_of(words)
    assert program.main([*words, f"--output-dir={tmp_path / 'run'}"]) == 0
    for part in ("teacher", "student", "optimizer", "gradients"):
        assert need[part]["step"] == found[part] > 0
    pieces = ("activations", "blocks of logits, or a layer again", "loss", "gradients", "weights as products take them")
    assert sum(need[part]["step"] for part in pieces) == pytest.approx(found["training_step"], rel=0.25)
    of_rollout = ("keys and values", "drawing a token", "weights as products take them")
    assert sum(need[part]["rollout"] for part in of_rollout) == pytest.approx(found["__call__"], rel=0.25)


def test_options_change_the_plan_as_they_change_the_run(tmp_path: Path) -> None:
    words = arguments(tmp_path)
    plain, step = bytes_of(words), ("student", "optimizer", "gradients")

    def ratios(*more: str, processes: int = 1, parts: tuple[str, ...] = step) -> list[float]:
        changed = bytes_of([*words, "--plan", *more], processes=processes)
        return [round(changed[part]["step"] / plain[part]["step"], 2) for part in parts]

    assert ratios("--student-dtype=bfloat16") == [0.5, 0.5, 0.5]
    assert ratios("--optim=adafactor") == [1, 0, 1]
    assert ratios(processes=4) == [1, 1, 2]  # DDP's buckets
    assert ratios("--fsdp", processes=4) == [0.25] * 3
    assert ratios("--teacher-dtype=bfloat16", parts=("teacher",)) == [0.5]
    assert ratios("--max-prompt-tokens=3", "--per-device-train-batch-size=4", parts=("activations",)) == [2]
    stages = {"zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(stages))
    assert ratios(f"--deepspeed={tmp_path / 'zero.json'}", processes=4) == [1, 0.25, 0.25]

    def tokens(*more: str) -> list[float]:
        changed = bytes_of([*words, *more])["keys and values"]
        return [round(changed[phase] / plain["keys and values"][phase], 2) for phase in ("rollout", "evaluation")]

    assert tokens("--max-new-tokens=17") == [2, 2]
    assert tokens("--eval-max-new-tokens=17", "--evaluation-batch-size=32") == [1, 4]
    assert tokens("--generation-batch-size=2", "--rollout-prompts=16") == [0.25, 1]
    assert tokens("--rollout-prompts=16") == [2, 1]


def test_states_of_optimizers_by_their_names() -> None:
    learnt = [torch.zeros(256, 4, dtype=torch.bfloat16, device="meta")]
    sizes = {"adamw_torch_fused": 4096, "adamw_bnb_8bit": 2080, "paged_lion_8bit": 1040, "adamw_torch_4bit": 1152}
    assert {name: states(name, learnt) for name in sizes} == sizes


def test_sharding_that_accelerate_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"fsdp": None, "deepspeed": None}
    assert shared_out(given) == 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert shared_out(given) == 3


def test_eager_attention_grows_with_the_square(tmp_path: Path) -> None:
    words = arguments(tmp_path)

    def kept(attention: str, tokens: int) -> float:
        options = parse_options([*words, f"--attn-implementation={attention}"])
        student = plan.hollow("--student", str(options.models.student), "float32", options)
        return activations(student, 1, tokens, False, False)[1]

    # Of each layer the probabilities of two heads, against the mask as numbers.
    assert kept("eager", 10_000) == pytest.approx(2 * kept("sdpa", 10_000), rel=0.02)


def test_a_run_that_exceeds_its_device_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        pass

    def stop(*given: Any) -> None:
        raise Stopped

    monkeypatch.setattr(scenarios, "load_model", stop)
    for has, warned in ((1e-6, True), (1.0, False)):
        monkeypatch.setattr(plan, "room", lambda *given, has=has: has)
        with pytest.raises(Stopped):
            program.main(arguments(tmp_path, f"--output-dir={tmp_path / 'run'}"))
        assert ("of cpu by an estimate, which has 0.0; see --plan" in capsys.readouterr().err) == warned
    assert program.main(arguments(tmp_path, "--plan", "--eval-prompts=99")) == 0
    out = capsys.readouterr().out
    assert "GiB that the process needs on its cpu device, with prompts of 512 tokens" in out
    assert "at most 0.0 GiB, in the step: fits 1.0" in out and not (tmp_path / "run").exists()
    assert program.main(["--plan"]) == 2
    assert "argument --plan: needs --teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "device", "has"), [("24gb", torch.device("cuda"), 23.0), ("laptop", CPU, 12.0)], ids=["24gb", "laptop"]
)
def test_small_machines_have_a_config_that_fits(name: str, device: torch.device, has: float, tmp_path: Path) -> None:
    for model, hidden, width in (("Qwen3-1.7B", 2048, 6144), ("Qwen3-0.6B", 1024, 3072)):
        (tmp_path / model).mkdir()
        shape = {"hidden_size": hidden, "intermediate_size": width}
        (tmp_path / model / "config.json").write_text(json.dumps({**QWEN3, **shape}))
    file = CONFIGS / f"qwen3-0.6b-{name}.yaml"
    assert "not run" in file.read_text()
    words = ["--plan", "--config", str(file), f"--teacher={tmp_path}/Qwen3-1.7B", f"--student={tmp_path}/Qwen3-0.6B"]
    options = parse_options(words)
    rows = planned(options, device, 1, options.prompts.max_prompt_tokens or 0)
    assert plan.most(rows)[0] < has
    parts = dict(rows)
    assert parts["teacher"]["step"] == pytest.approx(3.205, abs=0.001)  # 1,720,574,976 parameters in bfloat16
    assert room(CPU, 2, options) == pytest.approx((room(CPU, 1, options) or 0) / 2)


def test_a_quantized_teacher_keeps_its_head(tmp_path: Path) -> None:
    options = parse_options(arguments(tmp_path))
    teacher = plan.hollow("--teacher", str(options.models.teacher), "float32", options)
    linear = [m for m in teacher.modules() if isinstance(m, torch.nn.Linear) and m is not teacher.lm_head]
    count = sum(m.weight.numel() for m in linear)
    whole = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(str(options.models.teacher)).parameters())
    assert len(linear) == 7 and plan.quantized_bytes(teacher, None) == whole
    assert plan.quantized_bytes(teacher, "torchao-int8") == whole - 3 * count
    assert plan.quantized_bytes(teacher, "bitsandbytes-4bit") == whole - (4 - 0.5625) * count
