"""The loss sees what plain logits would give, and the denominator is the whole step's."""

from __future__ import annotations

import pytest
import torch
from distillation.errors import UsageError
from distillation.evaluation import agreement
from distillation.metrics import StepTotals
from distillation.models import align_ends, check_head, hidden_states, without_dropout
from distillation.rollouts import Rollouts, completion_mask, end_of_sequence_ids, left_pad
from distillation.training import score
from transformers import AutoModelForCausalLM, PreTrainedModel

from eopd_kernels import EntropyGate, Objective

from .conftest import CONFIGS, EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words

PROMPTS = [[3, 4, 5, 6], [7], [8, 9, 10], [11, 12]]
ANSWERS = [[13, EOS], [14, 15, 16, 17, EOS], [18, 19, 20, 21, 22], [EOS]]


def batch() -> Rollouts:
    """Prompts and completions of unequal length; one of them never ends."""
    prompts, attention = left_pad(PROMPTS, PAD, torch.device("cpu"))
    width = max(map(len, ANSWERS))
    answers = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in ANSWERS])
    mask = completion_mask(answers, [EOS])
    return Rollouts(torch.cat([prompts, answers], 1), torch.cat([attention, mask.long()], 1), mask)


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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_dropout_training_mode_computes_what_eval_mode_does(kind: str) -> None:
    config = CONFIGS[kind]()
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    model = AutoModelForCausalLM.from_config(config)
    whole = batch()
    expected = hidden_states(model.eval(), whole.input_ids, whole.attention_mask)
    assert not torch.allclose(hidden_states(model.train(), whole.input_ids, whole.attention_mask), expected)
    without_dropout(model)
    assert torch.equal(hidden_states(model.train(), whole.input_ids, whole.attention_mask), expected)


def test_both_models_end_where_either_does() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    teacher.generation_config.eos_token_id = [7, VOCABULARY + 3]  # the second one beyond what is shared
    tokenizer = tiny_tokenizer(tiny_words())
    assert align_ends(student, teacher, tokenizer, tokenizer, VOCABULARY) == [EOS, 7]
    assert end_of_sequence_ids(student, tokenizer) == end_of_sequence_ids(teacher, tokenizer) == [EOS, 7]


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
    scores = score(student, teacher, batch(), Objective())
    valid = batch().completion_mask
    totals = StepTotals(tau, VOCABULARY, student.device)
    totals.add_tokens(scores, scores.loss, valid)
    numbers = agreement(totals, totals.sums)
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
