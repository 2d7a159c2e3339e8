"""Bad input: the error names the argument, what came, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eopd_kernels import EntropyAwareKL, LMHead, entropy_aware_kl

S = torch.zeros(2, 3, 8)
W = torch.zeros(8, 4)
H = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        (S, S.clone().requires_grad_(), {}, ValueError, "teacher requires grad"),
        (S, H, {"teacher_head": LMHead(W.clone().requires_grad_())}, ValueError, "teacher_head.weight requires grad"),
        (
            S,
            H,
            {"teacher_head": LMHead(W, torch.zeros(8).requires_grad_())},
            ValueError,
            "teacher_head.bias requires grad",
        ),
        (S, S.to("meta"), {}, ValueError, "on one device, got student on cpu and teacher on meta"),
        (S, S, {"mask": torch.ones(2, 3, device="meta")}, ValueError, "student on cpu and mask on meta"),
        (S, S, {"num_items": torch.ones((), device="meta")}, ValueError, "student on cpu and num_items on meta"),
        (S, H, {"teacher_head": LMHead(W.to("meta"))}, ValueError, "teacher_head.weight on meta"),
        (S.long(), S, {}, TypeError, "student must be a floating-point tensor, got a int64 tensor of shape (2, 3, 8)"),
        (S, S.int(), {}, TypeError, "teacher must be a floating-point tensor, got a int32"),
        ([1.0], S, {}, TypeError, "student must be a floating-point tensor, got [1.0] of type list"),
        (S, S[:1], {}, ValueError, "same leading shape, got student (2, 3, 8) and teacher (1, 3, 8)"),
        (S, S[..., :7], {}, ValueError, "vocabularies of 8 and 7"),
        (
            S,
            S[..., :7],
            {"vocab_size": 8},
            ValueError,
            "vocab_size must be between 1 and the smaller vocabulary (student 8, teacher 7), got 8",
        ),
        (S, S, {"vocab_size": 0}, ValueError, "vocab_size must be between 1"),
        (S, S, {"vocab_size": 2.5}, TypeError, "vocab_size must be an int or None, got 2.5"),
        (S[..., :0], S[..., :0], {}, ValueError, "student must have the shape [..., V] with V >= 1, got (2, 3, 0)"),
        (
            H,
            S,
            {"student_head": LMHead(W[:0])},
            ValueError,
            "student_head.weight must have the shape [V, D] with V >= 1",
        ),
        (torch.tensor(1.0), S, {}, ValueError, "student must have the shape [..., V]"),
        (H[..., :3], S, {"student_head": LMHead(W)}, ValueError, "student hidden states must end in D = 4"),
        (H, S, {"student_head": W}, TypeError, "student_head must be an LMHead or None, got a float32 tensor"),
        (S, S, {"mask": torch.ones(2)}, ValueError, "mask must have the leading shape (2, 3), got (2,)"),
        (S, S, {"mask": [1, 1]}, TypeError, "mask must be a tensor or None"),
        (
            S,
            S,
            {"mask": torch.ones(2, 3, dtype=torch.complex64)},
            TypeError,
            "mask must be a bool, integer or floating",
        ),
        (S, S, {"labels": torch.ones(2, 2).long()}, ValueError, "labels must have the leading shape (2, 3)"),
        (S, S, {"labels": torch.ones(2, 3)}, TypeError, "labels must be an integer tensor, got a float32"),
        (
            S,
            S,
            {"reduction": "batchmean"},
            ValueError,
            "reduction must be one of ('mean', 'sum', 'none'), got 'batchmean'",
        ),
        (
            S,
            S,
            {"schedule": "fast"},
            ValueError,
            "schedule must be 'auto' or one of ('chunked', 'recompute'), got 'fast'",
        ),
        (
            S,
            S,
            {"schedule": "chunked", "reduction": "none"},
            ValueError,
            "with reduction='none' use schedule='recompute'",
        ),
        (S, S, {"backend": "tpu"}, ValueError, "backend must be 'auto' or one of"),
        (S, S, {"objective": "eopd"}, TypeError, "objective must be an Objective, got 'eopd'"),
        (S, S, {"num_items": -1}, ValueError, "num_items must be finite and at least 0, got -1"),
        (S, S, {"num_items": float("nan")}, ValueError, "num_items must be finite"),
        (S, S, {"num_items": "12"}, TypeError, "num_items must be a number, a 0-d tensor or None, got '12'"),
        (S, S, {"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a tensor of one element"),
        (S, S, {"num_items": 3, "reduction": "sum"}, ValueError, "num_items replaces the count of reduction='mean'"),
        (
            H,
            S,
            {"inplace": True, "student_head": LMHead(W)},
            ValueError,
            "inplace=True is for a student that is logits",
        ),
        (S, S, {"inplace": True, "schedule": "recompute"}, ValueError, "inplace=True needs schedule='chunked'"),
        (S, S, {"inplace": True, "reduction": "none"}, ValueError, "inplace=True needs schedule='chunked'"),
        (S.clone().requires_grad_(), S, {"inplace": True}, ValueError, "inplace=True would overwrite student, a leaf"),
        (
            S[:, :1].expand(2, 3, 8),
            S,
            {"inplace": True},
            ValueError,
            "dense and apart in memory, got strides (24, 0, 1)",
        ),
        (S, S, {"inplace": "yes"}, TypeError, "inplace must be a bool, got 'yes'"),
        (S, S, {"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
        (S, S, {"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int or None"),
    ],
)
def test_bad_input_is_refused_by_name(
    student: Any, teacher: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as raised:
        entropy_aware_kl(student, teacher, **options)
    assert says in str(raised.value)


def test_apply_refuses_likewise() -> None:
    with pytest.raises(ValueError, match=r"teacher_head.weight requires grad"):
        EntropyAwareKL.apply(H, H, W, W.clone().requires_grad_())
    with pytest.raises(ValueError, match="vocabularies of 8 and 4"):
        EntropyAwareKL.apply(S, H)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        EntropyAwareKL.apply(S, S, tau=0.8)


def test_a_teacher_with_parameters_is_fine_where_nothing_is_differentiated() -> None:
    with torch.no_grad():
        assert EntropyAwareKL.apply(H, H, W, W.clone().requires_grad_()) == 0
