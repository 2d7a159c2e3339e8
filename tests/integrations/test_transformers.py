"""transformers' own Trainer, against the specification computed on whole batches of logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from eopd_kernels import EntropyGate, Objective, Sampled, reference
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.figures import Figures
from eopd_kernels.integrations.transformers import DistillationMixin, compute_loss_func
from tests.conftest import relative_error
from tests.heads.tiny_models import built

from .conftest import tiny_pair

OBJECTIVE = Objective(gate=EntropyGate(1.0), alpha=0.7)


class Distiller(DistillationMixin, Trainer):
    """The one line that a user writes."""


def rows(count: int = 4, length: int = 9) -> list[dict[str, Any]]:
    """Sequences whose labels cover very different numbers of tokens, the first token's among them."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 40, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : 2 * row] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label}
        for i, label in zip(ids, labels, strict=True)
    ]


def expected_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: list[dict[str, Any]]) -> Tensor:
    """The mean over all tokens that are predicted, each sequence run by itself in fp64."""
    logits = [[m(input_ids=row["input_ids"][None]).logits[0, :-1] for row in batch] for m in (student, teacher)]
    labels = torch.cat([row["labels"][1:] for row in batch])
    return reference.entropy_aware_kl(
        torch.cat(logits[0]).double(), torch.cat(logits[1]).double().detach(), labels=labels, objective=OBJECTIVE
    ).loss


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    silent = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    step = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**silent, **step, "lr_scheduler_type": "constant", **changes})


def by_mixin(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> Any:
    return Distiller(student, teacher_model=teacher, objective=OBJECTIVE, **options)


def by_function(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> Trainer:
    figures = Figures()
    loss = compute_loss_func(student, teacher, OBJECTIVE, figures=figures)
    trainer = Trainer(student, compute_loss_func=loss, **options)
    trainer.log = figures.log_with(trainer.log, trainer)  # type: ignore[method-assign]
    return trainer


@pytest.fixture(params=[by_mixin, by_function], ids=["mixin", "function"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "phi"])
def test_a_step_is_that_of_the_specification(make: Any, tmp_path: Path, architecture: str) -> None:
    student, teacher = tiny_pair(architecture)
    before = copy.deepcopy(student)
    expected = expected_loss(before, teacher, rows())
    expected.backward()
    trainer = make(student, teacher, args=arguments(tmp_path, per_device_train_batch_size=4), train_dataset=rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True):
        assert old.grad is not None
        assert relative_error((old - new) / 0.1, old.grad) < 2e-3, name


@pytest.mark.parametrize("per_device", [1, 2])
def test_micro_batches_weigh_every_token_alike(make: Any, tmp_path: Path, per_device: int) -> None:
    student, teacher = tiny_pair()
    before = copy.deepcopy(student)
    expected = expected_loss(before, teacher, rows())
    expected.backward()
    cut = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 4 // per_device}
    trainer = make(student, teacher, args=arguments(tmp_path, **cut), train_dataset=rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    head, old = student.get_output_embeddings().weight, before.get_output_embeddings().weight
    assert relative_error((old - head) / 0.1, old.grad) < 2e-3


FIGURES = ("reverse_kl", "forward_kl", "teacher_entropy", "student_entropy", "gate")


def expected_figures(student: PreTrainedModel, teacher: PreTrainedModel, batch: list[dict[str, Any]]) -> Any:
    """The means over all tokens that are predicted, by the specification."""
    with torch.no_grad():
        logits = [[m(input_ids=row["input_ids"][None]).logits[0, :-1] for row in batch] for m in (student, teacher)]
    labels = torch.cat([row["labels"][1:] for row in batch])
    out = reference.entropy_aware_kl(
        torch.cat(logits[0]).double(), torch.cat(logits[1]).double(), labels=labels, objective=OBJECTIVE
    )
    return {name: getattr(out, name)[labels != -100].mean().item() for name in FIGURES}


@pytest.mark.parametrize("per_device", [1, 4])
def test_the_log_has_the_means_over_all_tokens_since_the_last_line(make: Any, tmp_path: Path, per_device: int) -> None:
    student, teacher = tiny_pair()
    before = copy.deepcopy(student)
    cut = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 4 // per_device}
    evaluated = {"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 2}
    settings = arguments(tmp_path, max_steps=2, learning_rate=0.0, **cut, **evaluated)
    trainer = make(student, teacher, args=settings, train_dataset=rows(), eval_dataset=rows()[:3])
    trainer.train()
    trained, evaluation = expected_figures(before, teacher, rows()), expected_figures(before, teacher, rows()[:3])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert {name: line[name] for name in FIGURES} == pytest.approx(trained, abs=1e-5)
    (line,) = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert {name: line[f"eval_{name}"] for name in FIGURES} == pytest.approx(evaluation, abs=1e-5)
    assert not set(FIGURES) & set(line)


def test_the_figures_are_those_of_all_processes(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    trainer = by_mixin(student, teacher, args=arguments(tmp_path))
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    student.train()
    trainer.compute_loss(student, batch)
    theirs = trainer.figures.last_output.sums() * torch.tensor([[3.0], [1.0]])  # as many tokens, three times the sums
    own = trainer.figures.means()
    trainer.compute_loss(student, batch)
    of_both = trainer.figures.means(reduce=lambda sums: sums + theirs)
    assert of_both == pytest.approx({name: 2 * mean for name, mean in own.items()})
    assert trainer.figures.means() == {}
    # A process without tokens of this kind takes part all the same.
    assert trainer.figures.means(training=False, reduce=lambda sums: sums + theirs) == pytest.approx(
        {name: 3 * mean for name, mean in own.items()}
    )


def test_how_the_loss_is_computed_can_be_said(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    plain = by_mixin(student, teacher, args=arguments(tmp_path)).compute_loss(student, batch)
    how: dict[str, Any] = {"schedule": "recompute", "backend": "torch", "workspace_bytes": 2**16}
    trainer = by_mixin(student, teacher, args=arguments(tmp_path), **how)
    torch.testing.assert_close(trainer.compute_loss(student, batch), plain)
    assert trainer.how == how
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        by_mixin(student, teacher, args=arguments(tmp_path), backend="gpu").compute_loss(student, batch)
    with pytest.raises(TypeError, match=r"compute_loss_func\(\) got an unexpected keyword argument 'tau'"):
        compute_loss_func(student, teacher, tau=0.8)


def test_the_mixin_counts_shifted_labels_whatever_the_models_own_loss_is(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    student.loss_type = "ForMaskedLM"
    expected = expected_loss(student, teacher, rows()).item()
    trainer = by_mixin(student, teacher, args=arguments(tmp_path, per_device_train_batch_size=4), train_dataset=rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_mixin_counts_its_own_labels_whatever_the_trainer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers before 5.10 counts the labels of first tokens too; and labels may have come shifted alone."""

    def before_5_10(self: Any, batch_samples: list[Any], device: torch.device) -> Tensor:
        return sum(batch["labels"].ne(-100).sum() for batch in batch_samples)

    def shifted(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        stacked = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        return {**stacked, "shift_labels": nn.functional.pad(stacked.pop("labels")[:, 1:], (0, 1), value=-100)}

    def first_loss(**options: Any) -> float:
        student, teacher = tiny_pair()
        settings = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        trainer = by_mixin(student, teacher, args=settings, train_dataset=rows(), **options)
        trainer.train()
        found: float = trainer.state.log_history[0]["loss"]
        return found

    expected = expected_loss(*tiny_pair(), rows()).item()
    assert first_loss(data_collator=shifted) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", before_5_10)
    assert first_loss() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("version", "works"), [("4.57.1", False), ("5.9.0", False), ("5.10.0", True)])
def test_a_trainer_that_counts_too_much_is_refused(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eopd_kernels.integrations.transformers.installed_version", lambda _: version)
    if works:
        compute_loss_func(*tiny_pair())
        return
    with pytest.raises(ValueError, match=f"5.10 or newer, got {version}.*DistillationMixin"):
        compute_loss_func(*tiny_pair())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_of_the_mixin_runs_in_the_trainers_precision(bf16: bool, tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    seen: dict[str, set[torch.dtype]] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        layer.register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    by_mixin(student, teacher, args=arguments(tmp_path, bf16=bf16), train_dataset=rows()).train()
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {"student": {dtype}, "teacher": {dtype}}


def test_evaluation_has_the_same_loss(make: Any, tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    trainer = make(student, teacher, args=arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=rows())
    expected = expected_loss(student, teacher, rows()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_metrics_see_all_logits_with_the_mixin(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    shapes = []
    trainer = by_mixin(
        student,
        teacher,
        args=arguments(tmp_path),
        eval_dataset=rows(),
        compute_metrics=lambda seen: shapes.append(seen.predictions.shape) or {},  # type: ignore[func-returns-value]
    )
    trainer.evaluate()
    assert shapes == [(4, 9, 40)]


def test_the_mixin_leaves_the_logits_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_pair()
    widths: list[int] = []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(lambda m, i, out: widths.append(out.shape[1]))
    trainer = by_mixin(student, teacher, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert widths == [1, 1]


def test_labels_that_are_shifted_already_stay_where_they_are(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    trainer = by_mixin(student, teacher, args=arguments(tmp_path))
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    plain = trainer.compute_loss(student, dict(batch))
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(trainer.compute_loss(student, {**batch, "shift_labels": shifted}), plain)


def test_the_count_of_all_processes_meets_the_mean_of_their_gradients(make: Any, tmp_path: Path) -> None:
    """Two processes whose gradients are averaged: each one's loss is over all tokens, times two."""
    student, teacher = tiny_pair()
    trainer = make(student, teacher, args=arguments(tmp_path, average_tokens_across_devices=True))
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    alone = trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(40))
    for state in (PartialState, trainer.accelerator.state):  # accelerate brings the second back to the first
        state._shared_state["num_processes"] = 2
    try:
        of_two = trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(40))
        trainer.args.average_tokens_across_devices = False
        own = trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(40))
    finally:
        for state in (PartialState, trainer.accelerator.state):
            state._shared_state["num_processes"] = 1
    torch.testing.assert_close(of_two, 2 * alone)
    torch.testing.assert_close(own, alone)


def test_the_teacher_is_a_constant(make: Any, tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    make(student, teacher, args=arguments(tmp_path), train_dataset=rows()).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_sampled_half_is_refused(make: Any, tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    with pytest.raises(ValueError, match="old log-probabilities"):
        Distiller(student, teacher_model=teacher, objective=Objective(reverse=Sampled()), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="old log-probabilities"):
        compute_loss_func(student, teacher, Objective(reverse=Sampled()))


def test_another_model_than_the_trainers_is_noticed() -> None:
    student, teacher = tiny_pair()
    loss = compute_loss_func(student, teacher)
    with pytest.raises(RuntimeError, match="the very model"):
        loss({"logits": torch.zeros(1, 3, 40)}, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="needs labels"):
        loss({"logits": torch.zeros(1, 3, 40)}, None)


@pytest.mark.parametrize("family", ["OPTForCausalLM", "Llama4ForCausalLM", "BartForCausalLM"])
def test_families_whose_base_model_is_not_what_their_head_reads(family: str, tmp_path: Path) -> None:
    student, teacher = built(family), built(family, seed=1)
    expected = expected_loss(student, teacher, rows()).item()
    trainer = by_mixin(student, teacher, args=arguments(tmp_path))
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    found = trainer.compute_loss(student, batch)
    assert isinstance(found, Tensor) and found.item() == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_labels_is_refused_with_what_to_do(tmp_path: Path) -> None:
    student, teacher = tiny_pair()
    trainer = by_mixin(student, teacher, args=arguments(tmp_path))
    ids = torch.ones(1, 4, dtype=torch.long)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "labels": None}):
        with pytest.raises(ValueError, match=r"DistillationMixin needs labels .* DataCollatorForLanguageModeling"):
            trainer.compute_loss(student, batch)


@pytest.mark.parametrize("name", ["compute_loss", "_get_num_items_in_batch"])
def test_a_method_that_has_moved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def method(self: Any, model: Any, inputs: Any) -> None: ...

    monkeypatch.setattr(Trainer, name, method)
    student, teacher = tiny_pair()
    version = hooks.installed_version("transformers")
    with pytest.raises(hooks.HookMoved, match=rf"transformers {version}.*{name} takes \(model, inputs\)"):
        by_mixin(student, teacher, args=arguments(tmp_path))


def test_a_trainer_whose_compute_loss_takes_anything_is_taken(tmp_path: Path) -> None:
    class Other(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            return super().compute_loss(model, inputs, *rest, **options)

    class OtherDistiller(DistillationMixin, Other):
        pass

    student, teacher = tiny_pair()
    trainer = OtherDistiller(student, teacher_model=teacher, args=arguments(tmp_path))
    ids = torch.ones(1, 4, dtype=torch.long)
    assert trainer.compute_loss(student, {"input_ids": ids, "labels": ids}) > 0


def test_a_model_that_cannot_leave_its_logits_out_is_refused(tmp_path: Path) -> None:
    class Whole(type(tiny_pair()[0])):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> Any:
            return super().forward(input_ids, attention_mask, labels=labels)

    student, teacher = tiny_pair()
    with pytest.raises(ValueError, match="must take logits_to_keep"):
        Distiller(Whole(student.config), teacher_model=teacher, args=arguments(tmp_path))
