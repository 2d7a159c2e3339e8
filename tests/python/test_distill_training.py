"""The loss sees what plain logits would give, and the denominator is the whole step's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation.errors import RunError, UsageError
from distillation.evaluation import agreement
from distillation.models import check_head, hidden_states
from distillation.rollouts import Rollouts, completion_mask, left_pad, sample
from distillation.training import accumulate_gradients, distill, score
from transformers import PreTrainedModel

from eopd_kernels import EntropyGate, Objective

from .conftest import EOS, PAD, tiny_model, tiny_tokenizer, tiny_words

PROMPTS = [[3, 4, 5, 6], [7], [8, 9, 10], [11, 12]]
ONE_STEP: dict[str, Any] = {
    "steps": 1,
    "micro_batch_size": 4,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
}
ANSWERS = [[13, EOS], [14, 15, 16, 17, EOS], [18, 19, 20, 21, 22], [EOS]]


def batch() -> Rollouts:
    """Prompts and completions of unequal length; one of them never ends."""
    prompts, attention = left_pad(PROMPTS, PAD, torch.device("cpu"))
    width = max(map(len, ANSWERS))
    answers = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in ANSWERS])
    mask = completion_mask(answers, [EOS])
    return Rollouts(torch.cat([prompts, answers], 1), torch.cat([attention, mask.long()], 1), mask)


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def median_teacher_entropy(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    entropy = score(student, teacher, batch(), Objective()).teacher_entropy
    return float(entropy[batch().completion_mask].median())


def plain_log_probabilities(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log softmax of the model's own logits for each token of ``answer``, [C, V], without batch or padding."""
    logits = model(torch.tensor([prompt + answer])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("student_kind", ["llama", "gpt2", "phi", "gemma2", "cohere", "granite"])
def test_scores_equal_those_of_plain_logits_one_sequence_at_a_time(student_kind: str) -> None:
    student, teacher = tiny_model(student_kind), tiny_model("gpt2").requires_grad_(False)
    tau = median_teacher_entropy(student, teacher)
    scores = score(student, teacher, batch(), Objective(gate=EntropyGate(tau)))
    losses = []
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        log_p = plain_log_probabilities(student, prompt, answer)
        log_q = plain_log_probabilities(teacher, prompt, answer)
        expected = {
            "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
            "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
            "student_entropy": -(log_p.exp() * log_p).sum(-1),
        }
        gate = (expected["teacher_entropy"] > tau).double()
        losses.append(expected["reverse_kl"] + gate * expected["forward_kl"])
        for name, values in {**expected, "gate": gate}.items():
            seen = getattr(scores, name)[row]
            torch.testing.assert_close(seen[: len(answer)].double(), values.detach(), rtol=2e-4, atol=2e-5)
            assert not seen[len(answer) :].any()
    loss = torch.cat(losses).mean()
    torch.testing.assert_close(scores.loss.double(), loss, rtol=2e-4, atol=2e-5)
    assert 0 < scores.gate.sum() < batch().completion_mask.sum()

    from_score = torch.autograd.grad(scores.loss, list(student.parameters()), allow_unused=True)
    from_logits = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    for ours, plain in zip(from_score, from_logits, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_one_batch(size: int) -> None:
    student, teacher = tiny_model("llama"), tiny_model("gpt2").requires_grad_(False)
    results = []
    for micro_batch_size in (len(PROMPTS), size):
        student.zero_grad()
        metrics = accumulate_gradients(student, teacher, list(batch().split(micro_batch_size)), Objective())
        results.append((metrics, gradients(student)))
    (whole, whole_gradients), (parts, part_gradients) = results
    assert parts == pytest.approx(whole, rel=1e-4)
    for part, one in zip(part_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(part, one, rtol=1e-3, atol=1e-6)


def test_the_metrics_are_means_over_valid_tokens() -> None:
    student, teacher = tiny_model("llama"), tiny_model("gpt2").requires_grad_(False)
    metrics = accumulate_gradients(student, teacher, list(batch().split(2)), Objective.reverse_kl())
    scores = score(student, teacher, batch(), Objective.reverse_kl())
    valid = batch().completion_mask
    assert metrics["loss"] == pytest.approx(float(scores.loss.detach()), rel=1e-4)
    assert metrics["loss"] == pytest.approx(metrics["reverse_kl"], rel=1e-4)
    assert metrics["forward_kl"] == pytest.approx(float(scores.forward_kl[valid].mean()), rel=1e-4)
    assert metrics["gate_fraction"] == 0


def test_distilling_lowers_the_loss_and_leaves_the_teacher_alone() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    tokenizer = tiny_tokenizer(tiny_words())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    steps = distill(
        student,
        teacher,
        lambda: sample(student, tokenizer, PROMPTS * 8, max_new_tokens=5),
        Objective(),
        steps=40,
        micro_batch_size=16,
        learning_rate=1e-2,
        weight_decay=0.0,
        warmup_steps=2,
        max_grad_norm=1.0,
    )
    losses = [metrics["loss"] for metrics in steps]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_gradients_are_clipped_before_the_step() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    (metrics,) = distill(student, teacher, batch, Objective(), **ONE_STEP | {"max_grad_norm": 1e-3})
    norm = torch.stack([gradient.norm() for gradient in gradients(student)]).norm()
    assert metrics["grad_norm"] > 1e-2
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_every_step_starts_from_zero_gradients() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    # Next to no learning: every step sees the same student and the same tokens.
    steps = distill(student, teacher, batch, Objective(), **ONE_STEP | {"steps": 3, "learning_rate": 1e-12})
    norms = [metrics["grad_norm"] for metrics in steps]
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RunError, match="nan at step 1"):
        list(distill(student, teacher, batch, Objective(), **ONE_STEP))


def test_hidden_states_do_not_depend_on_left_padding() -> None:
    model = tiny_model("gpt2")
    padded, attention = left_pad([[3, 4, 5], [6, 7, 8, 9, 10]], PAD, torch.device("cpu"))
    alone = hidden_states(model, torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(hidden_states(model, padded, attention)[0, 2:], alone[0], rtol=1e-4, atol=1e-5)


def test_a_model_whose_head_does_more_than_its_config_tells_is_refused() -> None:
    model = tiny_model("llama")
    check_head("--teacher", model, [3, 4, 5])
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UsageError, match="argument --teacher: the logits of LlamaForCausalLM are not"):
        check_head("--teacher", model, [3, 4, 5])


@pytest.mark.parametrize("kind", ["gpt2", "phi", "gemma2", "cohere", "granite"])
def test_the_heads_of_other_architectures_are_accepted(kind: str) -> None:
    check_head("--student", tiny_model(kind), [3, 4, 5])


def test_agreement_splits_at_tau() -> None:
    student, teacher = tiny_model("llama"), tiny_model("gpt2").requires_grad_(False)
    tau = median_teacher_entropy(student, teacher)
    numbers = agreement(student, teacher, list(batch().split(2)), tau=tau)
    scores = score(student, teacher, batch(), Objective())
    valid = batch().completion_mask
    uncertain = valid & (scores.teacher_entropy > tau)
    certain = valid & ~uncertain
    assert uncertain.any() and certain.any()
    assert numbers["tokens"] == int(valid.sum())
    assert numbers["uncertain_fraction"] == pytest.approx(int(uncertain.sum()) / int(valid.sum()))
    expected = {
        "student_entropy_uncertain": scores.student_entropy[uncertain],
        "teacher_entropy_uncertain": scores.teacher_entropy[uncertain],
        "forward_kl_uncertain": scores.forward_kl[uncertain],
        "forward_kl_certain": scores.forward_kl[certain],
    }
    for name, values in expected.items():
        assert numbers[name] == pytest.approx(float(values.mean()), rel=1e-4)
