"""common_entries, and both ways to compare models that share a part of their vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, TopK, TopKTeacher, common_entries, entropy_aware_kl
from tests.conftest import relative_error


class Tokenizer:
    """As those of transformers, as far as it is asked."""

    def __init__(self, vocabulary: Any) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> Any:
        return self.vocabulary


STUDENT = {"d": 0, "Ġa": 3, "b": 1, "Ġc": 5, "x": 2, "y": 4}
TEACHER = {"b": 6, "z": 3, "Ġc": 0, "w": 2, "Ġa": 1, "d": 7, "v": 4, "u": 5}


def test_the_same_string_at_the_same_place_in_the_students_order() -> None:
    student_ids, teacher_ids = common_entries(Tokenizer(STUDENT), Tokenizer(TEACHER))
    assert student_ids.tolist() == [0, 1, 3, 5] and teacher_ids.tolist() == [7, 6, 1, 0]
    for ids in (student_ids, teacher_ids):
        assert ids.dtype == torch.int64 and ids.device.type == "cpu" and ids.is_contiguous()
    back = common_entries(Tokenizer(TEACHER), Tokenizer(STUDENT))
    assert [ids.tolist() for ids in back] == [[0, 1, 6, 7], [5, 3, 1, 0]]


def test_a_default_device_does_not_move_them() -> None:
    with torch.device("meta"):
        student_ids, _ = common_entries(Tokenizer(STUDENT), Tokenizer(TEACHER))
    assert student_ids.tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_an_id_of_two_strings_is_left_out(of: str) -> None:
    student, teacher = dict(STUDENT), dict(TEACHER)
    (student if of == "student" else teacher)["b, renamed"] = (student if of == "student" else teacher)["b"]
    student_ids, teacher_ids = common_entries(Tokenizer(student), Tokenizer(teacher))
    assert student_ids.tolist() == [0, 3, 5] and teacher_ids.tolist() == [7, 1, 0]


BYTES = {"Ġa": 0, "Ġb": 1, "▁": 2, "a": 3, "Ã©": 4, "##": 5}
PIECES = {"▁a": 0, "▁b": 1, "Ġ": 2, "a": 3, "é": 4, "</w>": 5}


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (BYTES, PIECES, "must spell their entries alike, got word marks 'Ġ' and '▁'"),
        (PIECES, BYTES, "got word marks '▁' and 'Ġ'"),
        ({"##a": 0, "b": 1}, BYTES, "got word marks '##' and 'Ġ'"),
        ({"a</w>": 0, "b": 1}, PIECES, "got word marks '</w>' and '▁'"),
        ({"a": 0}, BYTES, "got word marks None and 'Ġ'.* bring both vocabularies to one spelling"),
        ({"a": 0, "b": 1}, {"c": 0}, "must have entries in common, got 2 and 1 of which none is the same string"),
        ({}, {}, "must have entries in common, got 0 and 0"),
        ({"a": 0, "b": 0}, {"a": 0, "b": 1}, "must have entries in common, got 0 and 2"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(student: Any, teacher: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        common_entries(Tokenizer(student), Tokenizer(teacher))


@pytest.mark.parametrize("side", ["student_tokenizer", "teacher_tokenizer"])
@pytest.mark.parametrize(
    "tokenizer",
    [None, {"a": 0}, "gpt2", Tokenizer(["a"]), Tokenizer({b"a": 0}), Tokenizer(None)],
    ids=["None", "dict", "str", "list", "bytes", "nothing"],
)
def test_what_is_no_tokenizer_is_refused_by_name(side: str, tokenizer: Any) -> None:
    given = {"student_tokenizer": Tokenizer(STUDENT), "teacher_tokenizer": Tokenizer(STUDENT), side: tokenizer}
    with pytest.raises(
        TypeError, match=rf"{side} must have a get_vocab\(\) that returns a dict of str to int, got a? ?"
    ):
        common_entries(**given)


def test_tokenizers_of_transformers() -> None:
    """With special tokens that were added, and those of the library beneath."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def built(*texts: str, size: int) -> Any:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    small = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built("the cat sat on the mat " * 9, size=270), eos_token="<|end|>"
    )
    large = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built("the hat of the cat " * 9, size=280), bos_token="<|begin|>", eos_token="<|end|>"
    )
    student_ids, teacher_ids = common_entries(small, large)
    assert small.convert_ids_to_tokens(student_ids.tolist()) == large.convert_ids_to_tokens(teacher_ids.tolist())
    common = set(small.get_vocab()) & set(large.get_vocab())
    assert len(student_ids) == len(common) and 256 < len(common) < len(small)
    assert small.eos_token_id in student_ids and large.bos_token_id not in teacher_ids
    assert not torch.equal(student_ids, teacher_ids)
    beneath = common_entries(small.backend_tokenizer, large.backend_tokenizer)
    assert torch.equal(beneath[0], student_ids) and torch.equal(beneath[1], teacher_ids)


V, V_T, D, N, K = 40, 50, 8, 30, 4


@pytest.fixture
def sides() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weight of the student, logits of the teacher, and the ids of ten entries that both have."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, teacher = normal(N, D).requires_grad_(), normal(V, D).requires_grad_(), 2 * normal(N, V_T)
    student_vocabulary = {f"{i * 7 % V}": i for i in range(V)}
    teacher_vocabulary = {f"{30 + i}": V_T - 1 - i for i in range(V_T)}
    return hidden, weight, teacher, *common_entries(Tokenizer(student_vocabulary), Tokenizer(teacher_vocabulary))


def test_renormalised_over_the_common_entries(sides: Any) -> None:
    hidden, weight, teacher, student_ids, teacher_ids = sides
    assert len(student_ids) == 10
    head = LMHead(weight).select(student_ids)
    out = entropy_aware_kl(hidden, teacher[:, teacher_ids], student_head=head, objective=Objective.forward_kl())
    out.loss.backward()
    found = [hidden.grad, weight.grad]
    q = teacher.softmax(1)[:, teacher_ids]
    p = (hidden @ weight.t()).softmax(1)[:, student_ids]
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    expected = (q * (q / p).log()).sum(1).mean()
    assert relative_error(out.loss, expected) < 1e-12
    for mine, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("answer", ["likeliest common", "likeliest, as served"])
def test_the_rest_is_one_more_class(answer: str, schedule: str, sides: Any) -> None:
    """The KL of k + 1 classes by hand: the last has all else of each side, whether common or not."""
    hidden, weight, teacher, student_ids, teacher_ids = sides
    log_q = teacher.log_softmax(1)
    if answer == "likeliest common":
        log_probs, places = log_q[:, teacher_ids].topk(K)
        ids = student_ids[places]
    else:
        to_student = torch.full((V_T,), -1)
        to_student[teacher_ids] = student_ids
        log_probs, likeliest = log_q.topk(K)
        ids = to_student[likeliest]
        assert {0, 2} <= set((ids >= 0).sum(1).tolist())  # with positions of which nothing is common
    entropy = -(log_q.exp() * log_q).sum(1)
    out = entropy_aware_kl(
        hidden,
        TopKTeacher(ids, log_probs, entropy=entropy),
        student_head=LMHead(weight),
        objective=Objective(reverse="none", forward=TopK(teacher="raw", tail=True), gate="always"),
        schedule=schedule,
        workspace_bytes=1,
    )
    out.loss.backward()
    found = [hidden.grad, weight.grad]

    common = ids >= 0
    q = torch.where(common, log_probs.exp(), 0.0)
    p = torch.where(common, (hidden @ weight.t()).softmax(1).gather(1, ids.clamp(min=0)), 0.0)
    rest_q, rest_p = 1 - q.sum(1), 1 - p.sum(1)
    of_entries = torch.where(common, q * (log_probs - torch.where(common, p, 1.0).log()), 0.0).sum(1)
    expected = (of_entries + rest_q * (rest_q / rest_p).log()).mean()
    assert relative_error(out.loss, expected) < 1e-12
    assert relative_error(out.teacher_entropy, entropy) < 1e-12 and not out.teacher_entropy_is_lower_bound
    for mine, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert relative_error(mine, theirs) < 1e-10
