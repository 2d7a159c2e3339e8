"""The Trainer: gradients and metrics of the whole optimizer step, however it is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation.answering import SampledAnswers
from distillation.errors import RunError
from distillation.models import hidden_states
from distillation.options import TrainingOptions
from distillation.prompts import Prompt
from distillation.rollouts import Completion, collate
from distillation.stream import PromptStream
from distillation.trainer import OnPolicyTrainer
from distillation.training import score
from transformers import PrinterCallback

from eopd_kernels import EntropyGate, LMHead, Objective, Sampled, entropy_aware_kl

from .conftest import PAD, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words

TAU = 3.05  # in the middle of the teacher's entropies
Step = tuple[dict[str, Any], dict[str, Any], list[Completion]]


def trained(
    folder: Path, objective: Objective, *, prompts: int = 8, rollout_prompts: int | None = None, **options: Any
) -> tuple[OnPolicyTrainer, list[Step]]:
    """A trainer that has run, and what it told of each step; the gradients of the last one are kept."""
    torch.manual_seed(0)
    student, teacher = tiny_model("llama"), tiny_model("gpt2")
    student.generation_config.eos_token_id = list(range(1, 9))  # so that some completions end
    if options.pop("broken", False):
        with torch.no_grad():
            student.get_output_embeddings().weight.fill_(float("nan"))
    given = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-12,
        "warmup_steps": 0,
        **options,
    }
    args = TrainingOptions(output_dir=str(folder), **given)
    stream = PromptStream([Prompt([3 + i] * (1 + i % 4), "") for i in range(prompts)], args.max_steps * 8, seed=0)
    steps: list[Step] = []
    tokenizer = tiny_tokenizer(tiny_words())
    trainer = OnPolicyTrainer(
        student,
        teacher,
        tokenizer,
        args,
        stream,
        objective=objective,
        tau=TAU,
        vocab_size=VOCABULARY,
        rollout_prompts=rollout_prompts,
        on_step=lambda *told: steps.append(told),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.answer = SampledAnswers(
        student, teacher, tokenizer, seed=0, max_new_tokens=7, vocab_size=VOCABULARY, batch_size=3
    )
    vars(student)["zero_grad"] = lambda: None
    trainer.train()
    return trainer, steps


def gradients(trainer: OnPolicyTrainer) -> list[torch.Tensor]:
    return [parameter.grad for parameter in trainer.student.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole_batch(size: int, tmp_path: Path) -> None:
    objective = Objective(gate=EntropyGate(TAU))
    whole, whole_steps = trained(tmp_path, objective, max_grad_norm=0.0)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    parts, part_steps = trained(tmp_path, objective, max_grad_norm=0.0, **cut)
    lengths = {len(completion.ids) for completion in whole_steps[0][2]}
    assert len(lengths) > 1 and part_steps[0][2] == whole_steps[0][2]
    for part, one in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(part, one, rtol=1e-3, atol=1e-6)
    for name in ("loss", "forward_kl_open", "forward_kl_closed", "student_entropy", "gate_fraction", "tokens"):
        assert part_steps[0][0][name] == pytest.approx(whole_steps[0][0][name], rel=1e-4)


def test_the_metrics_are_those_of_the_tokens(tmp_path: Path) -> None:
    trainer, [(metrics, histograms, completions)] = trained(tmp_path, Objective.reverse_kl())
    batch = collate(completions, PAD, torch.device("cpu"))
    seen = score(trainer.student, trainer.teacher, batch, Objective())
    valid = batch.completion_mask
    opened, closed = valid & (seen.teacher_entropy > TAU), valid & (seen.teacher_entropy <= TAU)
    assert opened.any() and closed.any()
    for name in ("reverse_kl", "forward_kl", "teacher_entropy", "student_entropy"):
        for split, where in (("", valid), ("_open", opened), ("_closed", closed)):
            assert metrics[name + split] == pytest.approx(getattr(seen, name)[where].mean().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(metrics["reverse_kl"], rel=1e-4) and metrics["gate_fraction"] == 0
    assert metrics["tokens"] == int(valid.sum()) == sum(histograms["teacher_entropy"])
    assert metrics["completion_length"] == pytest.approx(int(valid.sum()) / 8)
    clipped = sum(not completion.ended for completion in completions)
    assert 0 < clipped < 8 and metrics["clipped_fraction"] == clipped / 8
    parts = [metrics[f"{part}_seconds"] for part in ("rollout", "teacher", "student", "loss", "optimizer")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(metrics["tokens"] / metrics["tokens_per_second"])


def test_the_papers_objective_weighs_what_was_drawn_with_what_it_was_drawn_with(tmp_path: Path) -> None:
    objective = Objective.eopd_paper()
    trainer, [(metrics, _, completions)] = trained(tmp_path, objective, max_grad_norm=0.0)
    batch = collate(completions, PAD, torch.device("cpu"))
    hidden = [
        hidden_states(model, batch.input_ids, batch.attention_mask)[:, batch.prompt_width - 1 : -1]
        for model in (trainer.student, trainer.teacher)
    ]
    log_p = hidden[0] @ trainer.student.get_output_embeddings().weight.t()
    old = log_p.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0].detach()
    expected = entropy_aware_kl(
        hidden[0],
        hidden[1].detach(),
        student_head=LMHead.from_model(trainer.student),
        teacher_head=LMHead.from_model(trainer.teacher),
        mask=batch.completion_mask,
        objective=objective,
        token_ids=batch.completion_ids,
        old_log_probs=old,
    )
    assert metrics["loss"] == pytest.approx(float(expected.loss.detach()), rel=1e-4, abs=1e-5)
    found = gradients(trainer)
    for parameter in trainer.student.parameters():
        parameter.grad = None
    expected.loss.backward()
    for ours, theirs in zip(found, gradients(trainer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


FAST: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}


def test_a_rollout_is_drawn_once_and_learnt_from_in_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    call = SampledAnswers.__call__

    def counted(self: SampledAnswers, draws: Any) -> list[Completion]:
        asked.append([draw.number for draw in draws])
        return call(self, draws)

    monkeypatch.setattr(SampledAnswers, "__call__", counted)
    _, steps = trained(tmp_path, Objective.eopd_paper(), max_steps=5, rollout_prompts=16, **FAST)
    assert asked == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    _, still = trained(tmp_path, Objective.eopd_paper(), max_steps=5)  # a student that stays as it is
    alike = [one[2] == other[2] for one, other in zip(steps, still, strict=True)]
    assert alike[:2] == [True, True] and not any(alike[2:])
    for one, other in zip(steps[1][2], still[1][2], strict=True):  # the log-probabilities are those of the draw too
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_a_process_that_comes_first_makes_the_checkpoints_folder(tmp_path: Path) -> None:
    trainer, [(_, _, completions)] = trained(tmp_path, Objective())
    trainer.drawn = {8: completions[0]}
    trainer._save_rng_state(str(tmp_path / "partial" / "checkpoint-1"))
    [(number, kept)] = json.loads((tmp_path / "partial" / "checkpoint-1" / "rollout-0.json").read_text()).items()
    assert number == "8" and Completion(**kept) == completions[0] and kept["log_probs"] == completions[0].log_probs


@pytest.mark.parametrize("clips", [{}, {"clip_low": 0.05, "clip_high": 0.4, "clip_most": 1.1}])
def test_the_share_of_clipped_tokens_is_that_of_the_ratio_now_to_the_draws(
    clips: dict[str, float], tmp_path: Path
) -> None:
    objective = Objective(reverse=Sampled(**clips), forward="none", gate="never")
    _, steps = trained(tmp_path, objective, max_steps=2, rollout_prompts=16, **FAST)
    before, _ = trained(tmp_path, objective, max_steps=1, **FAST)  # the student that the second step begins with
    batch = collate(steps[1][2], PAD, torch.device("cpu"))
    with torch.no_grad():
        log_p, log_q = (
            (hidden_states(model, batch.input_ids, batch.attention_mask) @ model.get_output_embeddings().weight.t())
            .log_softmax(-1)[:, batch.prompt_width - 1 : -1]
            .gather(-1, batch.completion_ids[..., None])[..., 0]
            for model in (before.student, before.teacher)
        )
    half = Sampled(**clips)
    count, loss, low, high = 0, 0.0, 1 - half.clip_low, 1 + half.clip_high
    for i, completion in enumerate(steps[1][2]):
        assert completion.log_probs is not None
        for j, old in enumerate(completion.log_probs):
            ratio, advantage = float((log_p[i, j] - old).exp()), float(log_q[i, j]) - old
            most = half.clip_most or math.inf
            count += ratio > high if advantage > 0 else ratio < low or ratio > most
            worst = max(-advantage * ratio, -advantage * min(max(ratio, low), high))
            loss += min(worst, -advantage * most) if advantage < 0 else worst
    assert 0 < count < steps[1][0]["tokens"]
    assert steps[0][0]["clipped_by_ratio"] == 0
    assert steps[1][0]["clipped_by_ratio"] == pytest.approx(count / steps[1][0]["tokens"])
    assert steps[1][0]["loss"] == pytest.approx(loss / steps[1][0]["tokens"], rel=1e-4)


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_model("llama")
    before = tiny_model("gpt2").state_dict()
    trainer, steps = trained(tmp_path, Objective(), max_steps=30, learning_rate=1e-2, max_grad_norm=1.0)
    assert steps[-1][0]["loss"] < 0.7 * steps[0][0]["loss"]
    assert [metrics["step"] for metrics, _, _ in steps] == list(range(1, 31))
    after = trainer.teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_gradients_are_clipped_and_the_norm_is_that_before(tmp_path: Path) -> None:
    trainer, [(metrics, _, _)] = trained(tmp_path, Objective(), max_grad_norm=1e-3)
    norm = torch.stack([gradient.norm() for gradient in gradients(trainer)]).norm()
    assert metrics["grad_norm"] > 1e-2
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss became nan at step 1"):
        trained(tmp_path, Objective(), broken=True)


def test_the_librarys_record_has_the_metrics(tmp_path: Path) -> None:
    trainer, steps = trained(tmp_path, Objective(), max_steps=2)
    record = trainer.state.log_history[1]
    assert record["step"] == 2
    for name in ("forward_kl_open", "tokens_per_second", "grad_norm", "loss"):
        assert record[name] == steps[1][0][name]
