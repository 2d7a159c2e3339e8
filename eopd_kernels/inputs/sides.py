"""Checks of the two sides of the comparison: logits or hidden states, their heads, their vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_floating, check_whole, described
from ..distributed.data_parallel import check_not_partitioned, is_dtensor
from ..heads.lm_head import LMHead, tensors_of


def check_side(name: str, tensor: Tensor, head: LMHead | None, least: int = 1) -> None:
    """Checks logits ``[..., V]`` or, with a head, hidden states ``[..., D]``; V must be ``least`` or more."""
    check_floating(
        name,
        tensor,
        f"pass its logits, or hidden states such as its hidden_states[-1] with {name}_head=LMHead.from_model(model)",
    )
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} must be an ordinary tensor with this rank's tokens, got a DTensor: pass {name}.to_local(), or "
            f"{name}.full_tensor() where it is not sharded by tokens"
        )
    if head is not None and not isinstance(head, LMHead):
        raise TypeError(
            f"{name}_head must be an LMHead or None, got {described(head)}: pass LMHead.from_model(model), "
            "or LMHead(weight) of a weight [V, D]"
        )
    if tensor.dim() < 1 or tensor.shape[-1] < (least if head is None else 1):
        last = "V" if head is None else "D"
        raise ValueError(f"{name} must have the shape [..., {last}] with {last} >= 1, got {tuple(tensor.shape)}")
    if head is not None:
        check_not_partitioned(f"{name}_head.weight", head.weight)
        if len(head.weight) < least:
            raise ValueError(
                f"{name}_head.weight must have the shape [V, D] with V >= 1, got {tuple(head.weight.shape)}"
            )
    if head is not None and tensor.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} hidden states must end in D = {head.weight.shape[1]} as {name}_head.weight "
            f"{tuple(head.weight.shape)} does, got {tuple(tensor.shape)}"
        )


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """Refuses a gradient that would never come: all but the student and its head are constants of the loss."""
    if not tensor.requires_grad:
        return
    of_teacher, remedy = name.startswith("teacher"), "pass it detached"
    if name.startswith("teacher_head"):
        remedy = "call teacher.requires_grad_(False) once, or pass it detached"
    elif of_teacher:
        remedy = "run the teacher under torch.no_grad(), or pass it detached"
    respect = "the teacher" if of_teacher else f"{name}"
    raise ValueError(f"{name} requires grad, but the loss is never differentiated with respect to {respect}: {remedy}")


def width(tensor: Tensor, head: LMHead | None) -> int:
    """Returns V of a side."""
    return tensor.shape[-1] if head is None else head.weight.shape[0]


def common_vocabulary(
    student: Tensor,
    student_head: LMHead | None,
    teacher: Tensor | None,
    teacher_head: LMHead | None,
    vocab_size: int | None,
) -> int:
    """Returns how many leading vocabulary entries are compared; a teacher without logits has the student's."""
    of_student = width(student, student_head)
    of_teacher = of_student if teacher is None else width(teacher, teacher_head)
    if vocab_size is None:
        if of_student != of_teacher:
            heads = {"student": student_head, "teacher": teacher_head}
            taken = "".join(
                f"{side} was taken for logits, as it came without {side}_head: if it is hidden states, pass that; "
                for side, head in heads.items()
                if head is None
            )
            raise ValueError(
                f"student and teacher have vocabularies of {of_student} and {of_teacher}; {taken}where entries up to "
                "some size mean the same tokens in both, pass that size as vocab_size; where only some do, pass heads "
                "of these, LMHead.select(ids)"
            )
        return of_student
    if not 1 <= vocab_size <= min(of_student, of_teacher):
        raise ValueError(
            f"vocab_size must be between 1 and the smaller vocabulary (student {of_student}, teacher {of_teacher}), "
            f"got {vocab_size}"
        )
    return vocab_size


def check_vocab_size(vocab_size: int | None) -> None:
    """Refuses what is no size of a vocabulary, whatever the vocabularies are."""
    if vocab_size is not None:
        check_whole("vocab_size", vocab_size, "an int or None")


def needs_gradient(student: Tensor, head: LMHead | None) -> tuple[bool, bool, bool]:
    """Returns which gradients autograd will ask for: those of the student, its weight and its bias.

    autograd.Function.forward could not tell, because it runs without gradients.
    """
    enabled = torch.is_grad_enabled()
    weight, bias = (enabled and t is not None and t.requires_grad for t in tensors_of(head))
    return enabled and student.requires_grad, weight, bias
