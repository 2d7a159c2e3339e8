"""Vocabularies of two sizes, of odd sizes, and large ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eopd_kernels import LMHead, Objective, Sampled, TopK, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved

STUDENT, TEACHER, REAL = 151_936, 152_064, 151_665  # Qwen 2.5's small and large models, and the tokens that exist


@pytest.mark.parametrize("compared", [STUDENT, REAL])
def test_qwen_of_two_widths(compared: int) -> None:
    """meta-pytorch/torchtune#2119, #2598, microsoft/LMOps#331, huggingface/trl#6252: 152,064 against 151,936 entries of
    one tokenizer; the padding of either has no mass and no gradient."""
    student, teacher = normal(2, STUDENT, seed=1), normal(2, TEACHER, seed=2)
    student[:, REAL:] = teacher[:, REAL:] = 9.0
    loss, ours = solved(student, teacher, vocab_size=compared, objective=Objective.reverse_kl())
    leaf = student[:, :compared].double().requires_grad_()
    truth = plain(leaf, teacher[:, :compared]).reverse_kl.mean()
    close(loss, truth)
    close(ours[:, :compared], gradient(truth, leaf))
    assert not ours[:, compared:].any()


@pytest.mark.parametrize("hidden", [False, True])
def test_two_widths_are_not_guessed_at(hidden: bool) -> None:
    """NVIDIA/Model-Optimizer#2489: whether the extra entries are to be cut was nowhere said; here they are refused
    until vocab_size says it."""
    student, teacher = (normal(3, 8), normal(3, 8)) if hidden else (normal(3, 40), normal(3, 44))
    heads: dict[str, Any] = {}
    if hidden:
        heads = {"student_head": LMHead(normal(40, 8)), "teacher_head": LMHead(normal(44, 8))}
    with pytest.raises(ValueError, match=r"vocabularies of 40 and 44.*vocab_size"):
        entropy_aware_kl(student, teacher, **heads)
    for beyond in (41, 44, 0):
        with pytest.raises(ValueError, match="vocab_size must be between 1 and the smaller vocabulary"):
            entropy_aware_kl(student, teacher, vocab_size=beyond, **heads)


def test_the_end_of_a_vocabulary_is_cut_not_filled_with_zeros() -> None:
    """linkedin/Liger-Kernel's JSD pads the smaller vocabulary with logits of 0 (huggingface/trl#6457 refuses that):
    an entry of logit 0 has mass."""
    student, teacher = normal(4, 20, seed=1) - 6, normal(4, 24, seed=2) - 6
    loss, _ = solved(student, teacher, vocab_size=20, objective=Objective.forward_kl())
    truth = plain(student, teacher[:, :20]).forward_kl.mean()
    padded = plain(torch.cat([student, torch.zeros(4, 4)], 1), teacher).forward_kl.mean()
    close(loss, truth)
    assert abs(padded - truth) > 0.3


@pytest.mark.parametrize("vocab_size", [1, 31, 33, 1000, 1025])
def test_a_softcap_makes_no_mass_beyond_the_vocabulary(vocab_size: int, backend: str) -> None:
    """unslothai/unsloth#10616: lanes beyond V were loaded as −∞, and the softcap turned them into −softcap."""
    hidden, weight = normal(2, 6), normal(vocab_size, 6, seed=1)
    weight[:, 0] -= 8 * hidden[:, :1].mean().sign()  # strongly negative logits, beside which −1 would be everything
    teacher = normal(2, vocab_size, seed=2)
    leaf = hidden.clone().requires_grad_()
    out = entropy_aware_kl(
        leaf, teacher, student_head=LMHead(weight, softcap=1.0), objective=Objective.reverse_kl(), backend=backend
    )
    exact = hidden.double().requires_grad_()
    kls = plain(torch.tanh(exact @ weight.double().t()), teacher)
    close(out.loss, kls.reverse_kl.mean())
    close(out.student_entropy, kls.student_entropy)
    if vocab_size > 1:
        close(gradient(out.loss, leaf), gradient(kls.reverse_kl.mean(), exact), 1e-4)


@pytest.mark.parametrize("vocab_size", [65_536, 65_537, 102_400])
def test_a_vocabulary_larger_than_a_block(vocab_size: int) -> None:
    """unslothai/unsloth#91: 102,400 entries exceeded the largest block of 65,536."""
    student, teacher = normal(1, vocab_size, seed=1), normal(1, vocab_size, seed=2)
    student[0, -1], teacher[0, -1] = 14.0, 16.0  # the last entry is a good part of it
    loss, ours = solved(student, teacher, objective=Objective.forward_kl())
    leaf = student.double().requires_grad_()
    truth = plain(leaf, teacher).forward_kl.mean()
    close(loss, truth)
    close(ours, gradient(truth, leaf))


def test_a_sampled_token_and_a_top_k_beyond_the_compared_entries() -> None:
    """paiml/aprender#1877: a teacher's 152,064 entries reached a loop over the student's 151,936. Here an id that is
    not compared is refused, and the top k are those of the compared entries."""
    student, teacher = normal(2, 10, seed=1), normal(2, 14, seed=2)
    teacher[:, 10:] = 50.0
    objective = Objective(gate="always", reverse="none", forward=TopK(3, teacher="renormalized"))
    loss, _ = solved(student, teacher, vocab_size=10, objective=objective)
    log_p = torch.log_softmax(student.double(), 1)
    top, ids = torch.log_softmax(teacher[:, :10].double(), 1).topk(3)
    q = top.softmax(1)
    close(loss, (q * (q.log() - log_p.gather(1, ids))).sum(1).mean())
    sampled = Objective(reverse=Sampled(), forward="none", gate="never")
    known: dict[str, Any] = {"token_ids": torch.tensor([3, 10]), "old_log_probs": torch.tensor([-1.0, -1.0])}
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 10\)"):
        entropy_aware_kl(student, teacher, vocab_size=10, objective=sampled, **known)
