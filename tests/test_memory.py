"""Peak memory of the hidden-state path, measured in a fresh process: the budget, and nothing that grows with N × V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eopd_kernels import LMHead, entropy_aware_kl
from eopd_kernels.schedules.workspace import WORKSPACE_BYTES
from eopd_kernels.testing.processes import MIB, peak_memory
from tests.processes import fresh_process

VOCAB_SIZE, DIM = 32_768, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def growth(n: int, schedule: str, backend: str, dtype: str) -> int:
    """Bytes by which the process grows for a loss with all gradients, beyond the inputs."""

    def step(tokens: int, vocab_size: int) -> object:
        generator = torch.Generator().manual_seed(0)
        of = {"generator": generator, "dtype": DTYPES[dtype]}
        hidden = [torch.randn(tokens, DIM, **of) for _ in range(2)]  # type: ignore[call-overload]
        heads = [torch.randn(vocab_size, DIM, **of) for _ in range(2)]  # type: ignore[call-overload]
        student, weight = hidden[0].requires_grad_(), heads[0].requires_grad_()

        def run() -> list[torch.Tensor]:
            out = entropy_aware_kl(
                student,
                hidden[1],
                student_head=LMHead(weight),
                teacher_head=LMHead(heads[1]),
                schedule=schedule,
                backend=backend,
            )
            out.loss.backward()
            assert student.grad is not None and weight.grad is not None
            return [student.grad, weight.grad]

        return run

    torch.set_num_threads(1)
    step(64, 100)()  # type: ignore[operator]  # libraries and thread pools load on first use
    return peak_memory(step(n, VOCAB_SIZE))  # type: ignore[arg-type]


@pytest.mark.many_rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_peak_memory_keeps_to_the_budget(schedule: str, dtype: str, backend: str) -> None:
    n = 2048
    gradients = 4 * (n + VOCAB_SIZE) * DIM
    peak = fresh_process(growth, n, schedule, backend, dtype)
    logits = 2 * 4 * n * VOCAB_SIZE
    assert peak > WORKSPACE_BYTES / 2, "the measurement does not see the workspace"
    # Beyond the blocks: temporaries of the backend, panels of the head and of the matrix products.
    assert peak - gradients < WORKSPACE_BYTES + 48 * MIB < logits / 2


def few_tokens(n: int, dtype: str, backend: str) -> int:
    """The growth of one chunk whose head has a gradient larger than its logits."""

    def step(vocab_size: int) -> Callable[[], object]:
        of = {"generator": torch.Generator().manual_seed(0), "dtype": DTYPES[dtype]}
        hidden = [torch.randn(n, 256, **of) for _ in range(2)]  # type: ignore[call-overload]
        heads = [torch.randn(vocab_size, 256, **of) for _ in range(2)]  # type: ignore[call-overload]
        weight = heads[0].requires_grad_()
        heads_of: dict[str, Any] = {"student_head": LMHead(weight), "teacher_head": LMHead(heads[1])}

        def run() -> object:
            entropy_aware_kl(*hidden, **heads_of, backend=backend).loss.backward()
            return weight.grad

        return run

    torch.set_num_threads(1)
    step(100)()
    return peak_memory(step(65_536))


@pytest.mark.parametrize(("n", "dtype"), [(128, "float32"), (64, "bfloat16")])
def test_of_few_tokens_the_logits_make_room_for_the_heads_gradient(n: int, dtype: str) -> None:
    logits, weight = 4 * n * 65_536, 256 * 65_536 * DTYPES[dtype].itemsize
    peak = fresh_process(few_tokens, n, dtype, "cpu")
    assert weight < peak < weight + logits + 24 * MIB  # panels of the head and of dW, 8 MiB each


def test_peak_memory_does_not_grow_with_the_tokens() -> None:
    few, many = (fresh_process(growth, n, "chunked", "auto", "float32") for n in (2048, 4096))
    assert many - few < 4 * 2048 * DIM + 8 * MIB
