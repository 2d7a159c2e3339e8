"""The schedules: block shapes under a budget, and results that do not depend on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eopd_kernels import LMHead, entropy_aware_kl
from eopd_kernels.distributed.vocabulary import Shard
from eopd_kernels.schedules.sides import HiddenSide, LogitsSide
from eopd_kernels.schedules.workspace import MIN_COLUMNS, MIN_TOKENS, USUAL_MIN_TOKENS, WORKSPACE_BYTES, tiling
from eopd_kernels.tensors import uniform_rows
from tests.conftest import Case, make_case, relative_error, upstream_for


def hidden_side(n: int, vocab_size: int) -> HiddenSide:
    head = LMHead(torch.empty(1, 4).expand(vocab_size, 4))
    return HiddenSide(torch.empty(1, 4).expand(n, 4), head, vocab_size)


@given(
    n=st.integers(1, 100_000),
    vocab_size=st.integers(1, 300_000),
    schedule=st.sampled_from(["chunked", "recompute"]),
    budget=st.sampled_from([1, 2**20, 2**25, None]),
)
def test_blocks_keep_to_the_budget(n: int, vocab_size: int, schedule: str, budget: int | None) -> None:
    side = hidden_side(n, vocab_size)
    tokens, columns = tiling(schedule, n, side, side, gathered=False, workspace_bytes=budget)
    assert 1 <= tokens <= n and 1 <= columns <= vocab_size
    if schedule == "chunked":
        least = (MIN_TOKENS if budget else USUAL_MIN_TOKENS) * vocab_size
    else:
        least = MIN_TOKENS * min(MIN_COLUMNS, vocab_size)
    assert tokens * columns * 8 <= max(budget or WORKSPACE_BYTES, least * 8)
    if schedule == "chunked":
        assert columns == vocab_size
        chunks = -(-n // tokens)
        assert chunks == 1 or n - (chunks - 1) * tokens > tokens - chunks, "the last chunk is much smaller"


def test_the_published_case_takes_the_chunks_the_documentation_says() -> None:
    side = hidden_side(2048, 49_152)
    shape = tiling("chunked", 2048, side, side, gathered=False, workspace_bytes=None)
    assert shape.columns == 49_152 and shape.tokens * 49_152 * 8 <= 128 * 2**20


def test_ranks_of_uneven_shards_plan_the_same_chunks() -> None:
    sizes, budget = (200, 411), 8 * 80 * 411
    plans = []
    for size in sizes:
        side, shard = hidden_side(111, size), Shard(None, 0, size, sum(sizes), max(sizes), sums_hidden_gradient=True)
        plans.append(tiling("chunked", 111, side, side, gathered=False, workspace_bytes=budget, shard=shard))
    assert [plan.columns for plan in plans] == list(sizes)
    assert MIN_TOKENS < plans[0].tokens == plans[1].tokens < 111


def test_logits_need_no_workspace() -> None:
    side = LogitsSide(torch.empty(1, 1, 7).expand(50, 40, 7), 7)
    assert tiling("chunked", 2000, side, side, gathered=False, workspace_bytes=1) == (2000, 7)


@given(
    workspace_bytes=st.integers(1, 2**21),
    masked=st.booleans(),
    schedule=st.sampled_from(["chunked", "recompute"]),
    sides=st.sampled_from([("hidden", "hidden"), ("logits", "hidden"), ("hidden", "logits")]),
)
def test_the_workspace_does_not_change_the_result(
    workspace_bytes: int, masked: bool, schedule: str, sides: tuple[str, str]
) -> None:
    case = make_case(student=sides[0], teacher=sides[1], masked=masked, bias=True, vocab_size=1400)

    def solve(**options: Any) -> list[Tensor]:
        out = entropy_aware_kl(case.student, case.teacher, **case.arguments, reduction="sum", **options)
        gradients = torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss))
        return [out.loss, out.teacher_entropy, out.reverse_kl, *gradients]

    whole = solve(schedule="chunked", workspace_bytes=2**30)
    for value, expected in zip(solve(schedule=schedule, workspace_bytes=workspace_bytes), whole, strict=True):
        assert relative_error(value, expected) < 3e-6


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.many_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_no_tensor_of_tokens_times_vocabulary_is_made(schedule: str, dtype: torch.dtype, backend: str) -> None:
    n, vocab_size, dim = 3000, 2000, 8
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    student, teacher = random(n, dim).requires_grad_(), random(n, dim)
    heads = LMHead(random(vocab_size, dim).requires_grad_()), LMHead(random(vocab_size, dim))
    case = Case(student, teacher, *heads)
    workspace_bytes = 2**21
    with LargestTensor() as largest:
        out = entropy_aware_kl(
            student, teacher, **case.arguments, schedule=schedule, backend=backend, workspace_bytes=workspace_bytes
        )
        out.loss.backward()
    limit = max(workspace_bytes // 4, MIN_COLUMNS * n if schedule == "recompute" else 0)
    assert 0 < largest.elements <= limit < n * vocab_size


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(6, 5), (0, 6)),
        (torch.empty(2, 3, 5), (0, 6)),
        (torch.empty(2, 4, 5)[:, :-1], (1, 3)),
        (torch.empty(4, 2, 3, 5)[:, :, :-1], (2, 2)),
        (torch.empty(4, 2, 3, 5)[:, :-1], (1, 3)),
        (torch.empty(3, 2, 5).transpose(0, 1), (1, 3)),
        (torch.empty(3, 1, 5), (0, 3)),
        (torch.empty(4, 7, 5).as_strided((4, 1, 7, 5), (35, 3, 5, 1)), (0, 28)),
        (torch.empty(5), (0, 1)),
        (torch.empty(3, 9, 5)[..., :4], (0, 27)),
        (torch.empty(2, 6, 5)[:, ::2], (0, 6)),
    ],
)
def test_rows_of_one_stride(tensor: Tensor, expected: tuple[int, int]) -> None:
    assert uniform_rows(tensor) == expected
    side = LogitsSide(tensor, tensor.shape[-1])
    rows = tensor.reshape(-1, tensor.shape[-1])
    for start in range(0, len(rows), side.run):
        view = side.view(slice(start, start + side.run))
        assert view.data_ptr() == tensor.data_ptr() + (view.data_ptr() - tensor.data_ptr())
        assert torch.equal(view.nan_to_num(), rows[start : start + side.run].nan_to_num())
