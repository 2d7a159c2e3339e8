"""ms-swift's GKDTrainer where it is installed, which asks for other versions of trl than the rest of the suite; else a
stand-in with the methods that ms-swift 4.6.0 publishes, as far as the adapter knows them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, TopK, reference
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.swift import TRAINER, patch_swift
from tests.conftest import relative_error

from .conftest import tiny_pair


class Redirection:
    """Calls a method of the inner model by way of the outer one's forward."""

    def __call__(self, outer: Any, inner: Any, method: Any, *arguments: Any, **inputs: Any) -> Any:
        return method(*arguments, **inputs)


class GKDTrainer:
    """What a GKD trainer of ms-swift 4.6.0 does with its loss."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._prepare_liger_loss()

    def _prepare_liger_loss(self) -> None:
        self.use_liger_gkd_loss = False

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        read = {name: value for name, value in inputs["model_inputs"].items() if name != "labels"}
        assert self.use_liger_gkd_loss

        def inner(*_: Any, **__: Any) -> Tensor:
            return self._compute_liger_loss(model, inputs["model_inputs"], read)

        return self._forward_redirection(model, model, inner, **read)

    def _compute_liger_loss(self: Any, student: Any, model_inputs: Any, read: Any) -> Tensor:
        hidden = student.model(**read, use_cache=False).last_hidden_state
        with torch.no_grad():
            taught = self.teacher_model.model(**read, use_cache=False).last_hidden_state
        labels = model_inputs["input_ids"].masked_fill(model_inputs["labels"] == -100, -100)
        head, teacher_head = (model.get_output_embeddings() for model in (student, self.teacher_model))
        return self.liger_jsd_loss(
            student_input=hidden[:, :-1],
            student_weight=head.weight,
            teacher_input=taught[:, :-1],
            teacher_weight=teacher_head.weight,
            true_labels=labels[:, 1:].contiguous(),
            student_bias=getattr(head, "bias", None),
            teacher_bias=getattr(teacher_head, "bias", None),
        )


def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ms-swift 4.6.0's module of the trainer, as far as the adapter knows it."""
    for name in ("swift", "swift.rlhf_trainers", TRAINER):
        module: Any = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    methods = {
        name: value for name, value in vars(GKDTrainer).items() if not name.startswith("__") or name == "__init__"
    }
    module.GKDTrainer, module._ForwardRedirection = type("GKDTrainer", (), methods), Redirection
    return module


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the trainer, restored afterwards."""
    if importlib.util.find_spec("swift") is None:
        return published(monkeypatch)
    module = importlib.import_module(TRAINER)
    monkeypatch.setattr(module.GKDTrainer, "_prepare_liger_loss", module.GKDTrainer._prepare_liger_loss)
    return module


def trainer_of(theirs: Any, **options: Any) -> Any:
    """A trainer with what its loss needs of it, made by no command line."""
    trainer = object.__new__(theirs.GKDTrainer)
    trainer.model, trainer.teacher_model = tiny_pair()
    trainer.beta, trainer.temperature, trainer.gkd_logits_topk, trainer.is_teacher_ds3 = 0.5, 0.9, None, False
    trainer.args = SimpleNamespace(
        sft_alpha=options.pop("sft_alpha", 0),
        offload_teacher_model=False,
        gradient_checkpointing_kwargs=None,
        report_to=[],
        use_logits_to_keep=False,
    )
    trainer.template = SimpleNamespace(sequence_parallel_size=options.pop("sequence_parallel_size", 1))
    trainer.accelerator = SimpleNamespace(
        unwrap_model=lambda model: model,
        num_processes=1,
        is_main_process=True,
        state=SimpleNamespace(deepspeed_plugin=None),
    )
    trainer.lines = []
    trainer.log = lambda logs, start_time=None: trainer.lines.append(logs)
    for name, value in options.items():
        setattr(trainer, name, value)
    trainer._prepare_liger_loss()
    return trainer


def batch() -> dict[str, Any]:
    ids = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(8))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[4], [2]]), -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {
        "model_inputs": inputs,
        "teacher_model_inputs": dict(inputs),
        "gkd_batch": SimpleNamespace(data_source="dataset"),
    }


def logits_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits of the tokens that count, ``[n, V]``, and the tokens."""
    ids, labels = inputs["model_inputs"]["input_ids"], inputs["model_inputs"]["labels"]
    counted = labels[:, 1:] != -100
    student, teacher = (
        model(input_ids=ids).logits[:, :-1][counted] for model in (trainer.model, trainer.teacher_model)
    )
    return student, teacher.detach(), ids[:, 1:][counted]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_without_an_objective_it_is_their_divergence(theirs: Any, beta: float) -> None:
    patch_swift()
    patch_swift(backend="torch")  # as where ms-swift reads its plugins again, in a data loader's worker
    trainer = trainer_of(theirs, beta=beta)
    loss = trainer.compute_loss(trainer.model, batch())
    student, teacher, _ = logits_of(trainer, batch())
    p, q = ((logits / 0.9).log_softmax(-1) for logits in (student, teacher))
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    forward, reverse = (
        (a.exp() * (a - b)).sum(-1).mean() for a, b in ((q, p if beta == 0 else m), (p, q if beta == 1 else m))
    )
    expected = beta * forward + (1 - beta) * reverse if 0 < beta < 1 else forward if beta == 0 else reverse
    assert relative_error(loss, expected) < 1e-5
    weight = trainer.model.get_output_embeddings().weight
    found, truth = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    assert relative_error(found, truth) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("swift") is None, reason="ms-swift is not installed")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_it_is_what_they_compute_on_logits(theirs: Any, beta: float) -> None:
    patch_swift()
    trainer = trainer_of(theirs, beta=beta)
    loss = trainer.compute_loss(trainer.model, batch())
    labels = batch()["model_inputs"]["labels"]
    ids = batch()["model_inputs"]["input_ids"]
    student = trainer.model(input_ids=ids).logits
    teacher = theirs.TeacherOutput(full_logits=trainer.teacher_model(input_ids=ids).logits.detach(), labels=labels)
    expected = trainer._compute_jsd_loss(student, teacher, labels)
    assert relative_error(loss, expected) < 1e-5
    weight = trainer.model.get_output_embeddings().weight
    found, truth = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    assert relative_error(found, truth) < 1e-4


def test_an_objective_takes_its_place_and_is_logged(theirs: Any) -> None:
    objective = Objective(gate=EntropyGate(0.5), alpha=0.4, cross_entropy=0.2)
    patch_swift(objective, schedule="recompute")
    trainer = trainer_of(theirs, temperature=1.0)
    loss = trainer.compute_loss(trainer.model, batch())
    student, teacher, tokens = logits_of(trainer, batch())
    expected = reference.entropy_aware_kl(student.double(), teacher.double(), objective=objective, token_ids=tokens)
    assert relative_error(loss, expected.loss.to(loss.dtype)) < 1e-5
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch())
    trainer.log({"loss": 1.0}, None)
    trainer.log({"eval_loss": 1.0})
    line, evaluated = trainer.lines
    assert line["teacher_entropy"] == pytest.approx(float(expected.teacher_entropy.mean()), rel=1e-4)
    assert evaluated["eval_gate"] == pytest.approx(line["gate"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher_model": None}, "needs --teacher_model"),
        ({"gkd_logits_topk": 8}, r"--gkd_logits_topk 8.*TopK\(8\)"),
        ({"sft_alpha": 0.1}, r"needs --sft_alpha 0, got 0.1"),
        ({"sequence_parallel_size": 2}, "needs --sequence_parallel_size 1"),
        ({"temperature": 0.9}, r"temperature is 1.0 and ms-swift's 0.9"),
        ({"model": "gemma2"}, "model must have plain logits, got scale=1.0, softcap=0.5"),
        ({"teacher_model": "gemma2"}, "teacher_model must have plain logits"),
        ({"model": "lora"}, "model must have an output layer without an adapter"),
    ],
)
def test_what_would_silently_be_wrong_is_refused(theirs: Any, options: dict[str, Any], says: str) -> None:
    made = dict(options)
    for name, value in options.items():
        if value == "lora":
            made[name] = get_peft_model(tiny_pair()[0], LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
        elif isinstance(value, str):
            made[name] = tiny_pair(value)[0]
    patch_swift(Objective(forward=TopK(8)))
    with pytest.raises(ValueError, match=says):
        trainer_of(theirs, **{"temperature": 1.0} | made)


def test_lora_elsewhere_is_taken(theirs: Any) -> None:
    adapted = get_peft_model(tiny_pair()[0], LoraConfig(target_modules=["q_proj"], r=2))
    patch_swift()
    assert trainer_of(theirs, model=adapted).use_liger_gkd_loss


@pytest.mark.parametrize("other", ["swift.megatron", "swift.ray"])
def test_other_trainers_of_theirs_are_refused(theirs: Any, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = theirs.GKDTrainer._prepare_liger_loss
    monkeypatch.setitem(sys.modules, other, ModuleType(other))
    with pytest.raises(NotImplementedError, match="Megatron or Ray"):
        patch_swift()
    assert theirs.GKDTrainer._prepare_liger_loss is before


def test_what_is_asked_wrongly_is_refused(theirs: Any) -> None:
    with pytest.raises(ValueError, match="old log-probabilities"):
        patch_swift(Objective.eopd_paper())
    with pytest.raises(TypeError, match="patch_swift"):
        patch_swift(chunks=3)


def takes_more(self: Any, more: Any) -> None: ...


def calls_nothing(self: Any, *arguments: Any, **options: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "moved", "says"),
    [
        ("_prepare_liger_loss", takes_more, r"_prepare_liger_loss takes \(more\), expected \(\)"),
        ("__init__", calls_nothing, "__init__ does not call _prepare_liger_loss"),
        ("compute_loss", calls_nothing, "compute_loss does not call use_liger_gkd_loss"),
        ("_compute_liger_loss", calls_nothing, "_compute_liger_loss does not call liger_jsd_loss"),
        ("_ForwardRedirection", None, "has no _ForwardRedirection"),
    ],
)
def test_what_moved_is_said(theirs: Any, name: str, moved: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if moved is None:
        monkeypatch.delattr(theirs, name)
    else:
        monkeypatch.setattr(theirs.GKDTrainer, name, moved)
    before = theirs.GKDTrainer._prepare_liger_loss
    with pytest.raises(hooks.HookMoved, match=says):
        patch_swift()
    assert theirs.GKDTrainer._prepare_liger_loss is before
