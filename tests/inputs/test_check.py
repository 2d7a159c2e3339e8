"""Bad input: the error names the argument, what came, and what is allowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eopd_kernels import EntropyAwareKL, LMHead, entropy_aware_kl

S = torch.zeros(2, 3, 8)
W = torch.zeros(8, 4)
H = torch.zeros(2, 3, 4)
BOTH = torch.zeros(2, 2, 3, 8)
OUTPUT = SimpleNamespace(logits=S, hidden_states=(H, H))
MODEL = torch.nn.Sequential(torch.nn.Linear(4, 8))
NESTED = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)])


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
        ([1.0], S, {}, TypeError, "student must be a floating-point tensor, got a list of length 1: pass its logits"),
        (OUTPUT, S, {}, TypeError, "got a SimpleNamespace: pass its logits, or hidden states such as its hidden_stat"),
        (S, (S, S), {}, TypeError, "teacher must be a floating-point tensor, got a tuple of length 2: pass its logits"),
        (H, S, {"student_head": torch.nn.Linear(4, 8)}, TypeError, "got a Linear: pass LMHead.from_model(model), or"),
        (S, S, {"objective": MODEL}, TypeError, "objective must be an Objective, got a Sequential"),
        (S, S, {"reduction": S}, ValueError, "got a float32 tensor of shape (2, 3, 8) on cpu"),
        (S, S, {"backend": [S]}, ValueError, "backend must be 'auto' or one of"),
        (S, S, {"mask": [S] * 99}, TypeError, "mask must be a tensor or None, got a list of length 99"),
        (S.to_sparse(), S, {}, TypeError, "student must be a dense tensor, got a sparse_coo float32 tensor of shape"),
        (S, S.to_sparse(), {}, TypeError, "teacher must be a dense tensor, got a sparse_coo float32 tensor of shape"),
        (S, S, {"mask": torch.ones(2, 3).to_sparse()}, TypeError, "mask must be a dense tensor, got a sparse_coo"),
        (S, S, {"gate": torch.ones(2, 3).to_sparse()}, TypeError, "gate must be a dense tensor, got a sparse_coo"),
        (NESTED, S, {}, TypeError, "student must be a dense tensor, got a nested float32 tensor on cpu: pad it"),
        (S.to_mkldnn(), S, {}, TypeError, "student must be a dense tensor, got a _mkldnn float32 tensor of shape"),
        (S.to(torch.float8_e4m3fn), S, {}, TypeError, "student must have one of the dtypes float32, bfloat16, float16"),
        (S, S.to(torch.float8_e5m2), {}, TypeError, "teacher must have one of the dtypes float32, bfloat16, float16"),
        (S.to(torch.complex64), S, {}, TypeError, "student must be a floating-point tensor, got a complex64 tensor"),
        (S, S[:1], {}, ValueError, "same leading shape, got student (2, 3, 8) and teacher (1, 3, 8)"),
        (S, S[..., :7], {}, ValueError, "vocabularies of 8 and 7"),
        (S, H, {}, ValueError, "student was taken for logits, as it came without student_head: if it is hidden states"),
        (H, S[..., :7], {"student_head": LMHead(W)}, ValueError, "vocabularies of 8 and 7; teacher was taken for log"),
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
        (S, S, {"num_items": torch.tensor(-3)}, ValueError, "num_items must be finite and at least 0, got a tensor"),
        (S, S, {"num_items": torch.tensor(torch.inf)}, ValueError, "num_items must be finite and at least 0"),
        (S, S, {"num_items": torch.tensor(torch.nan)}, ValueError, "num_items must be finite and at least 0"),
        (S, S, {"num_items": torch.tensor(2.0, requires_grad=True)}, ValueError, "num_items requires grad"),
        (S, S, {"mask": torch.ones(2, 3, requires_grad=True)}, ValueError, "mask requires grad, but the loss is never"),
        (S, S, {"gate": torch.ones(2, 3, requires_grad=True)}, ValueError, "gate requires grad"),
        (S, S, {"reverse_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "reverse_weights requires grad"),
        (S, S, {"forward_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "forward_weights requires grad"),
        (S, S, {"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5 of type float"),
        (S, S, {"ignore_index": "x"}, TypeError, "ignore_index must be an int, got 'x' of type str"),
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
        (
            torch.zeros(40).unfold(0, 8, 3),
            torch.zeros(11, 8),
            {"inplace": True},
            ValueError,
            "dense and apart in memory, got strides (3, 1)",
        ),
        (BOTH[0], BOTH[0], {"inplace": True}, ValueError, "needs a student and a teacher apart in memory"),
        (BOTH[0], BOTH.flatten()[5:53].view(2, 3, 8), {"inplace": True}, ValueError, "views of one tensor that meet"),
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
    assert len(str(raised.value)) < 400, "an error says what came, not everything that is in it"


def test_halves_of_one_tensor_may_be_compared_in_place() -> None:
    student, teacher = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = entropy_aware_kl(student.clone(), teacher.clone()).loss
    assert torch.equal(entropy_aware_kl(student, teacher, inplace=True).loss, expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64], ids=str
)
@pytest.mark.parametrize("ignore_index", [-100, 3, 300, -(2**40), 2**40])
def test_labels_of_any_integer_type_are_compared_by_value(dtype: torch.dtype, ignore_index: int) -> None:
    """uint16 65,436, uint8 156 and a uint64 have the bits of -100, and an ignore_index of 300 those of int8 44."""
    labels = torch.tensor([0, 3, 44, 156, 65_436, -100, 300]).to(dtype)
    student, teacher = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    counted = [value != ignore_index for value in labels.tolist()]
    out = entropy_aware_kl(student, teacher, labels=labels, ignore_index=ignore_index)
    expected = entropy_aware_kl(student, teacher, mask=torch.tensor(counted))
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.reverse_kl, expected.reverse_kl)


def test_apply_refuses_likewise() -> None:
    with pytest.raises(ValueError, match=r"teacher_head.weight requires grad"):
        EntropyAwareKL.apply(H, H, W, W.clone().requires_grad_())
    with pytest.raises(ValueError, match="vocabularies of 8 and 4"):
        EntropyAwareKL.apply(S, H)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        EntropyAwareKL.apply(S, S, tau=0.8)  # type: ignore[call-arg]


def test_a_teacher_with_parameters_is_fine_where_nothing_is_differentiated() -> None:
    with torch.no_grad():
        assert EntropyAwareKL.apply(H, H, W, W.clone().requires_grad_()) == 0
