"""Tensors of any strides: the result is that of the same numbers laid out densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, TopK, TopKTeacher, entropy_aware_kl

LEADING = (1, 5)
V = 9
K = 3

# From a dense tensor of this shape to one of the same shape and other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda t: t.flatten()[:1].view((1,) * t.dim()).expand(t.shape),
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "size-1 stride": lambda t: t.as_strided(t.shape, (7, *t.stride()[1:])),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(student: Tensor, teacher: Any, **options: Any) -> list[Tensor]:
    """Loss, figures and gradient of one call."""
    leaf = student.detach().requires_grad_()
    out = entropy_aware_kl(leaf, teacher, **options)
    loss = out.loss.sum() if out.loss.dim() else out.loss
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(-1.3))
    return [out.loss, out.gate, out.reverse_half, out.forward_half, out.teacher_entropy, gradient]


def agree(a: list[Tensor], b: list[Tensor]) -> None:
    """Up to the last bits: the CUDA kernels cut a row into vectors by its alignment."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


PER_TOKEN = {
    "mask": torch.rand(LEADING, generator=torch.Generator().manual_seed(3)),
    "labels": torch.tensor([[1, -100, 2, 3, -100]]),
    "token_ids": torch.tensor([[1, 5, 2, 8, 0]]),
    "old_log_probs": -numbers(*LEADING, seed=4).abs(),
    "advantages": numbers(*LEADING, seed=10),
    "gate": torch.tensor([[0.5, 0.0, 1.0, 0.25, 1.0]]),
    "reverse_weights": numbers(*LEADING, seed=5),
    "forward_weights": numbers(*LEADING, seed=6),
}
SPARSE = {
    "ids": torch.tensor([[[0, 3, 8], [1, 2, 3], [8, 7, 6], [0, 1, 2], [5, 6, 7]]]),
    "log_probs": torch.log_softmax(numbers(*LEADING, K + 2, seed=7), -1)[..., :K].contiguous(),
    "entropy": numbers(*LEADING, seed=8).abs(),
    "valid": torch.tensor([[[True, True, False]]]).repeat(1, 5, 1),
    "token_log_probs": -numbers(*LEADING, seed=9).abs(),
}
EOPD = Objective(reverse="sampled", forward=TopK(K))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_tensors(name: str, schedule: str, layout: str, backend: str = "auto") -> None:
    student, teacher = numbers(*LEADING, V), numbers(*LEADING, V, seed=1)
    sampled = {"token_ids", "old_log_probs", "advantages"}
    options = {n: PER_TOKEN[n] for n in (sampled if name in sampled else {name})}
    options[name] = LAYOUTS[layout](PER_TOKEN[name])
    dense = {n: t.contiguous().clone() for n, t in options.items()}
    given: dict[str, Any] = {"schedule": schedule, "backend": backend, "reduction": "sum"}
    given["objective"] = EOPD if name in sampled else Objective(alpha=0.7)
    agree(outcome(student, teacher, **given, **options), outcome(student, teacher, **given, **dense))


@pytest.mark.parametrize("name", ["mask", "forward_weights"])
def test_per_token_tensors_on_every_backend(name: str, backend: str) -> None:
    test_per_token_tensors(name, "chunked", "one number", backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_teachers_tensors(name: str, layout: str) -> None:
    student = numbers(*LEADING, V)
    given = {**SPARSE, name: LAYOUTS[layout](SPARSE[name])}
    dense = {n: t.contiguous().clone() for n, t in given.items()}
    options = {"objective": EOPD, "token_ids": PER_TOKEN["token_ids"], "old_log_probs": PER_TOKEN["old_log_probs"]}
    agree(outcome(student, TopKTeacher(**given), **options), outcome(student, TopKTeacher(**dense), **options))


# Logits, or hidden states, whose dimensions of one element have strides of their own.
SIDES: dict[str, Callable[[], Tensor]] = {
    "permuted": lambda: numbers(3, 2, 1, V).permute(1, 2, 0, 3),
    "1 in front": lambda: numbers(3, 2, 1, V).permute(2, 1, 0, 3),
    "1 between": lambda: numbers(2, 3, 1, V).permute(0, 2, 1, 3),
    "all 1": lambda: numbers(1, 1, 1, V).as_strided((1, 1, 1, V), (5, 2, 3, 1)),
    "1 with stride 0": lambda: numbers(2, 3, V)[:, None].as_strided((2, 1, 3, V), (3 * V, 0, V, 1)),
    "expanded": lambda: numbers(2, 1, 1, V).expand(2, 1, 4, V),
    "one entry": lambda: numbers(3, 2, 1, 1).permute(1, 2, 0, 3),
    "overlapping": lambda: numbers(30).unfold(0, V, 3)[None, None],
}


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("odd", ["student", "teacher", "both"])
@pytest.mark.parametrize("layout", SIDES)
def test_logits(layout: str, odd: str, schedule: str, backend: str = "auto") -> None:
    strided = SIDES[layout]()
    dense = strided.contiguous().clone()
    other = numbers(*dense.shape, seed=2)
    student, teacher = {
        "student": ((strided, other), (dense, other)),
        "teacher": ((other, strided), (other, dense)),
        "both": ((strided, strided + 0), (dense, dense + 0)),
    }[odd]
    for options in ({}, {"objective": Objective.jsd()}):
        given: dict[str, Any] = {"schedule": schedule, "backend": backend, **options}
        agree(outcome(*student, **given), outcome(*teacher, **given))


@pytest.mark.parametrize("layout", ["permuted", "1 with stride 0", "one entry", "overlapping"])
def test_logits_on_every_backend(layout: str, backend: str) -> None:
    test_logits(layout, "both", "chunked", backend)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("layout", SIDES)
def test_hidden_states_and_heads(layout: str, schedule: str) -> None:
    strided = SIDES[layout]()
    dense = strided.contiguous().clone()
    weight = numbers(strided.shape[-1], 11, seed=4).t()  # [11, D], the columns of a dense matrix
    mask = torch.arange(strided[..., 0].numel()).view(strided.shape[:-1]) % 3 != 1
    given: dict[str, Any] = {"schedule": schedule, "mask": mask, "workspace_bytes": 1}
    heads = {f"{side}_head": LMHead(weight) for side in ("student", "teacher")}
    same = {f"{side}_head": LMHead(weight.contiguous()) for side in ("student", "teacher")}
    agree(outcome(strided, strided + 0.1, **given, **heads), outcome(dense, dense + 0.1, **given, **same))
