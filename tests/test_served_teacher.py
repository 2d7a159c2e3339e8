"""A teacher of which a few entries are served: against the reference, and beside the logits that they come from."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, Sampled, TopK, TopKTeacher, entropy_aware_kl, reference
from tests.conftest import Case, relative_error, size, skip_unless
from tests.test_objectives import case_of
from tests.test_oracle import assert_no_worse_than_plain

SPARSE = [TopK(), TopK(teacher="raw"), TopK(student="renormalized"), TopK(teacher="raw", tail=True)]


def sparse_teacher_of(case: Case, k: int, **options: Any) -> TopKTeacher:
    """The teacher of ``case`` as a server hands it out: k entries of each token in no order, one of them missing."""
    assert isinstance(case.teacher, Tensor)
    leading = case.student.shape[:-1]
    vocab_size = case.teacher.shape[-1] if case.teacher_head is None else len(case.teacher_head.weight)
    z_t = reference.transformed_logits(case.teacher, case.teacher_head, vocab_size, 1.0)
    log_probs, ids = torch.log_softmax(z_t, 1).topk(k, 1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    ids, log_probs = ids[:, order], log_probs[:, order]
    ids[::2, 1] = -1
    log_probs[1::2, 2] = -torch.inf
    return TopKTeacher(ids.view(*leading, k), log_probs.view(*leading, k), **options)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("reverse", ["none", Sampled(), TopK(teacher="raw", tail=True)], ids=str)
@pytest.mark.parametrize("forward", SPARSE, ids=str)
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_a_teacher_of_a_few_entries(student: str, forward: TopK, reverse: Any, schedule: str, backend: str) -> None:
    skip_unless(forward.tail and student == "hidden", backend)
    objective = Objective(gate=EntropyGate(1.0), alpha=0.7, reverse=reverse, forward=forward)
    case = case_of(objective, student=student, masked=True, **size(backend))
    leading = case.student.shape[:-1]
    generator = torch.Generator().manual_seed(5)
    for entropy in (None, 3 * torch.rand(leading, generator=generator)):
        of_tokens = -2 * torch.rand(leading, generator=generator)
        teacher = sparse_teacher_of(case, 6, entropy=entropy, token_log_probs=of_tokens)
        sparse = replace(case, teacher=teacher, teacher_head=None)
        assert_no_worse_than_plain(sparse, schedule=schedule, backend=backend, workspace_bytes=1)
        out = entropy_aware_kl(sparse.student, teacher, **sparse.arguments)
        assert out.teacher_entropy_is_lower_bound == (entropy is None)
        assert 0.05 < out.gate.mean() < 0.95 and out.forward_kl[sparse.mask].isnan().all()


@pytest.mark.parametrize("forward", SPARSE, ids=str)
def test_a_served_teacher_equals_its_logits(forward: TopK) -> None:
    """Where the server hands out what the top-k half would have found, and the entropy."""
    objective = Objective(gate=EntropyGate(2.0), reverse="none", forward=replace(forward, k=9))
    case = case_of(objective)
    assert isinstance(case.teacher, Tensor)
    dense = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    z_t = reference.transformed_logits(case.teacher, case.teacher_head, 611, 1.0)
    log_probs, ids = torch.log_softmax(z_t, 1).topk(9, 1)
    leading = case.student.shape[:-1]
    teacher = TopKTeacher(ids.view(*leading, 9), log_probs.view(*leading, 9), entropy=dense.teacher_entropy)
    served = entropy_aware_kl(case.student, teacher, **{**case.arguments, "teacher_head": None})
    assert torch.equal(served.gate, dense.gate)
    torch.testing.assert_close(served.loss, dense.loss, rtol=1e-5, atol=1e-6)
    for one, two in zip(
        torch.autograd.grad(served.loss, case.leaves), torch.autograd.grad(dense.loss, case.leaves), strict=True
    ):
        assert relative_error(one, two) < 1e-5


def test_the_entropy_of_a_few_entries_is_a_lower_bound() -> None:
    case = case_of(Objective(reverse="none", forward="top_k"))
    truth = entropy_aware_kl(case.student, case.teacher, **case.arguments).teacher_entropy
    bounds = []
    for k in (1, 8, 64, 611):
        teacher = TopKTeacher(*entries_of(case, k))
        served = entropy_aware_kl(case.student, teacher, **{**case.arguments, "teacher_head": None})
        bounds.append(served.teacher_entropy)
        assert (bounds[-1] <= truth + 1e-5).all()
    assert all((later > earlier).any() for earlier, later in itertools.pairwise(bounds))
    torch.testing.assert_close(bounds[-1], truth, rtol=1e-4, atol=1e-5)


def entries_of(case: Case, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest entries of the teacher of ``case`` and their log-probabilities."""
    assert isinstance(case.teacher, Tensor)
    leading = case.student.shape[:-1]
    z_t = reference.transformed_logits(case.teacher, case.teacher_head, 611, 1.0)
    log_probs, ids = torch.log_softmax(z_t, 1).topk(k, 1)
    return ids.view(*leading, k), log_probs.view(*leading, k)
