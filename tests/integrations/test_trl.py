"""trl's own trainers, with and without the patch."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, Sampled
from eopd_kernels.integrations import hooks
from tests.conftest import logits_like, relative_error

from .conftest import require, tiny_pair, tokenizer

require_trl = pytest.fixture(autouse=True)(lambda: require("trl"))
STEPS = 20


@pytest.fixture
def adapter() -> Any:
    return importlib.import_module("eopd_kernels.integrations.trl")


@pytest.fixture
def calls(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> list[Objective]:
    """The objective of each call of our loss."""
    seen: list[Objective] = []
    ours = adapter.entropy_aware_kl

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(options["objective"])
        return ours(*arguments, **options)

    monkeypatch.setattr(adapter, "entropy_aware_kl", counted)
    return seen


logs: list[list[dict[str, float]]] = []  # of each run


def distillation_losses(tmp_path: Path, steps: int = STEPS, **config: Any) -> tuple[list[float], list[float]]:
    """The loss and the student's entropy of every step of a run of trl's DistillationTrainer, always the same one."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = tiny_pair()
    prompts = [{"prompt": " ".join(f"w{3 + (5 * i + j) % 30}" for j in range(3 + i % 4))} for i in range(80)]
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **config,
    }
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**arguments),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer(),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    logs.append(log)
    return [entry["loss"] for entry in log], [entry["entropy"] for entry in log]


def test_reverse_kl_runs_are_the_same_with_and_without_the_patch(
    adapter: Any, calls: list[Objective], tmp_path: Path
) -> None:
    logs.clear()
    expected, entropies = distillation_losses(tmp_path, beta=1.0)
    assert len(expected) == STEPS and not calls
    with adapter.patch_trl(Objective(gate="never")):
        found, ours = distillation_losses(tmp_path, beta=1.0)
    assert len(calls) == 2 * STEPS, "the patch was not active in every micro-batch"
    assert found == pytest.approx(expected, abs=1e-4)
    assert ours == pytest.approx(entropies, abs=1e-4)
    seen = {name: [line[name] for line in logs[-1]] for name in ("reverse_kl", "student_entropy", "gate")}
    # trl's figures are the mean of its micro-batches' means, ours those of all tokens.
    assert seen["reverse_kl"] == pytest.approx(found, rel=0.05) and set(seen["gate"]) == {0.0}
    assert seen["student_entropy"] == pytest.approx(ours, rel=0.05)
    assert "reverse_kl" not in logs[0][0]
    assert expected[-1] < 0.8 * expected[0], "a run that learns nothing compares nothing"


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_without_an_objective_the_trainers_own_beta_counts(
    adapter: Any, calls: list[Objective], tmp_path: Path, beta: float
) -> None:
    expected, _ = distillation_losses(tmp_path, 3, beta=beta, temperature=1.5)
    with adapter.patch_trl():
        found, _ = distillation_losses(tmp_path, 3, beta=beta, temperature=1.5)
    assert found == pytest.approx(expected, abs=1e-4)
    assert set(calls) == {Objective.gkd(beta, temperature=1.5)}


def test_the_entropy_aware_loss_trains(adapter: Any, calls: list[Objective], tmp_path: Path) -> None:
    objective = Objective(gate=EntropyGate(1.0))
    plain, _ = distillation_losses(tmp_path, 3, beta=1.0)
    with adapter.patch_trl(objective):
        found, _ = distillation_losses(tmp_path, 3, beta=1.0)
    assert set(calls) == {objective}
    assert all(a > b + 1e-3 for a, b in zip(found, plain, strict=True)), "the forward half is missing"


def chunked(**options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What trl's function of hidden states answers now, and the gradients of what it was given."""
    module = importlib.import_module("trl.trainer.distillation_trainer")
    generator = torch.Generator().manual_seed(3)
    student, teacher = logits_like(generator, 3, 5, 12), logits_like(generator, 3, 5, 20)
    heads = [torch.randn(50, d, generator=generator) / d**0.5 for d in (12, 20)]
    biases = [torch.randn(50, generator=generator) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (student, heads[0], biases[0])]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    answer = module._chunked_divergence_loss(
        student,
        teacher,
        heads[0],
        torch.nn.Parameter(heads[1]),
        options.pop("mask", mask),
        student_lm_head_bias=biases[0],
        teacher_lm_head_bias=torch.nn.Parameter(biases[1]),
        **options,
    )
    return list(answer), list(torch.autograd.grad(1.7 * answer[0], leaves))


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 1.0},
        {"beta": 0.0, "num_items_in_batch": 11},
        {"beta": 0.3, "temperature": 2.0, "num_items_in_batch": torch.tensor(5.5)},
        {"beta": 1.0, "student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
        {"beta": 1.0, "student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0},
        {"beta": 1.0, "mask": torch.zeros(3, 5)},
    ],
    ids=["plain", "count", "jsd", "scales", "softcaps", "nothing"],
)
def test_losses_metrics_and_gradients_are_trls(adapter: Any, options: dict[str, Any]) -> None:
    answer, gradients = chunked(**options)
    with adapter.patch_trl():
        found, ours = chunked(**options)
    for a, b in zip((*found, *ours), (*answer, *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "options", [{}, {"labels": True}, {"labels": True, "num_items_in_batch": 9}, {"reduction": "sum"}]
)
def test_the_jsd_of_logits_is_gkds(adapter: Any, beta: float, options: dict[str, Any]) -> None:
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(5)
    student = logits_like(generator, 2, 6, 40).requires_grad_()
    teacher = logits_like(generator, 2, 6, 40)
    if options.get("labels"):
        labels = torch.arange(12).view(2, 6)
        options = {**options, "labels": labels.masked_fill(labels % 3 == 0, -100)}
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.3, **options)
    (gradient,) = torch.autograd.grad(1.7 * expected, student)
    with adapter.patch_trl():
        found = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.3, **options)
        (ours,) = torch.autograd.grad(1.7 * found, student)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(ours, gradient) < 1e-4


def test_gkds_trainer_calls_it(adapter: Any, calls: list[Objective], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def losses() -> list[float]:
        student, teacher = tiny_pair()
        arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        silent = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                str(tmp_path), lmbda=0.0, beta=1.0, logging_steps=1, learning_rate=1e-2, **arguments, **silent
            ),
            data_collator=collate,
            train_dataset=Dataset.from_list([{"input_ids": [3 + (i + j) % 30 for j in range(8)]} for i in range(8)]),
            processing_class=tokenizer(),
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        return [entry["loss"] for entry in logs[-1]]

    expected = losses()
    with adapter.patch_trl(Objective.reverse_kl()):
        found = losses()
    assert len(calls) == 4
    assert found == pytest.approx(expected, abs=1e-4)
    assert [line["reverse_kl"] for line in logs[-1]] == pytest.approx(found, abs=1e-4)


def hooked() -> tuple[Any, ...]:
    trainer = importlib.import_module("trl.trainer.distillation_trainer")
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    log = trainer.DistillationTrainer.log, vars(gkd).get("log")
    return trainer._chunked_divergence_loss, gkd.__dict__["generalized_jsd_loss"], *log


def test_leaving_restores_trl_also_after_an_exception_and_from_within(adapter: Any) -> None:
    before = hooked()
    with pytest.raises(KeyError), adapter.patch_trl(Objective.reverse_kl()):
        outer = hooked()
        assert all(ours is not theirs for ours, theirs in zip(outer, before, strict=True))
        with adapter.patch_trl(Objective.forward_kl()):
            assert hooked()[0] is not outer[0]
        assert hooked() == outer
        raise KeyError
    assert hooked() == before


def test_what_unsloth_has_noted_of_the_jsd_is_forgotten(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for unsloth 2026.10, which notes on the trainer's class whether the JSD is trl's own."""
    gkd: Any = importlib.import_module("trl.experimental.gkd").GKDTrainer
    made_of_it: Any = type("UnslothGKDTrainer", (gkd,), {})
    own = gkd.generalized_jsd_loss

    def is_trls(trainer: Any) -> bool:
        if "_unsloth_gkd_jsd_supported_cache" not in vars(trainer):
            trainer._unsloth_gkd_jsd_supported_cache = trainer.generalized_jsd_loss is own
        return vars(trainer)["_unsloth_gkd_jsd_supported_cache"]

    trainers = gkd, made_of_it
    assert all(map(is_trls, trainers))
    with adapter.patch_trl():
        assert not any(map(is_trls, trainers))
    assert all(map(is_trls, trainers))
    for trainer in trainers:
        del trainer._unsloth_gkd_jsd_supported_cache


def test_another_thread_is_refused_and_changes_nothing(adapter: Any) -> None:
    caught: list[str] = []

    def intrude() -> None:
        try:
            with adapter.patch_trl(Objective.forward_kl()):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    with adapter.patch_trl(Objective.reverse_kl()):
        patched = hooked()
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        assert hooked() == patched
    assert len(caught) == 1 and "another thread" in caught[0]


def test_a_temperature_of_its_own_is_refused(adapter: Any) -> None:
    with adapter.patch_trl(Objective(temperature=2.0)), pytest.raises(ValueError, match=r"temperature is 2\.0.* 1\.0"):
        chunked(beta=1.0)


def test_what_trl_does_not_hand_over_is_refused_at_the_door(adapter: Any) -> None:
    with pytest.raises(ValueError, match="sampled reverse half"), adapter.patch_trl(Objective(reverse=Sampled())):
        pass
    with pytest.raises(TypeError, match="objective must be"), adapter.patch_trl("reverse_kl"):
        pass


def test_reductions_over_the_vocabulary_are_refused(adapter: Any) -> None:
    from trl.experimental.gkd import GKDTrainer

    with adapter.patch_trl(), pytest.raises(ValueError, match="'batchmean' and 'sum', got 'mean'"):
        GKDTrainer.generalized_jsd_loss(torch.randn(1, 2, 5), torch.randn(1, 2, 5), reduction="mean")


def renamed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "_chunked_divergence_loss")


def more_parameters(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_chunked_divergence_loss", lambda student, teacher, top_k: None)


def not_called(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.DistillationTrainer, "_compute_loss", lambda self, student, inputs, num_items: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "has no _chunked_divergence_loss"),
        (more_parameters, r"takes \(student, teacher, top_k\), expected \(student_hidden_states"),
        (not_called, "does not call _chunked_divergence_loss any more"),
    ],
)
def test_a_hook_that_has_moved_is_named_with_trls_version(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], message: str
) -> None:
    change(importlib.import_module("trl.trainer.distillation_trainer"), monkeypatch)
    gkd = hooked()[1] if change is not renamed else None
    version = hooks.installed_version("trl")
    with pytest.raises(hooks.HookMoved, match=f"(?s)trl {version}.*{message}"), adapter.patch_trl():
        pass
    assert gkd is None or hooked()[1] is gkd, "half of the patch was left behind"
