"""The GPU's way through the hidden-state path, walked on a CPU (eopd_kernels/testing/pretend.py).

What enters the products, that nothing waits for the device, and that the result is as exact as it claims; tests/gpu/
does the same on real hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eopd_kernels import LMHead, entropy_aware_kl, reference, tensors
from eopd_kernels.backends.torch import row_groups
from eopd_kernels.heads import products
from eopd_kernels.rows import BACKENDS
from eopd_kernels.schedules.sides import HiddenSide, LogitsSide, Side
from eopd_kernels.schedules.workspace import GPU_USUAL_MIN_TOKENS, GPU_WORKSPACE_BYTES, tiling
from eopd_kernels.testing import pretend
from tests.conftest import Case, make_case, relative_error, size, upstream_for

ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
CUDA = torch.device("cuda")
SCHEDULES = ["chunked", "recompute"]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretend.gpu():
        yield


def solve(function: Any, case: Case, **options: Any) -> list[Tensor]:
    out = function(case.student, case.teacher, **case.arguments, **options)
    return [out.loss, *torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss))]


def with_softcaps(case: Case) -> Case:
    assert case.student_head is not None and case.teacher_head is not None
    student, teacher = case.student_head, case.teacher_head
    return replace(
        case,
        student_head=LMHead(student.weight, student.bias, scale=0.8, softcap=20.0),
        teacher_head=LMHead(teacher.weight, teacher.bias, softcap=30.0),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("teacher", ["hidden", "logits"])
def test_the_result_is_as_exact_as_the_products(
    dtype: torch.dtype, schedule: str, masked: bool, teacher: str, backend: str
) -> None:
    case = make_case(dtype=dtype, masked=masked, teacher=teacher, bias=True, **size(backend))
    case = with_softcaps(case) if teacher == "hidden" else case
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    ours = solve(entropy_aware_kl, case, schedule=schedule, backend=backend, workspace_bytes=2**17)
    # Products and sums are fp32, so that the loss knows nothing of 16 bits; a gradient is rounded twice, in its block
    # and at the end.
    assert relative_error(ours[0], truth[0]) < 3e-6
    for leaf, value, exact in zip(case.leaves, ours[1:], truth[1:], strict=True):
        assert value.dtype == leaf.dtype
        assert relative_error(value, exact) < 3 * ROUNDING[dtype] + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("budget", [None, 2**17])
def test_products_take_16_bits_and_give_32_without_a_wait(
    dtype: torch.dtype, schedule: str, budget: int | None, backend: str
) -> None:
    case = make_case(dtype=dtype, masked=True, bias=True, **size(backend))
    assert case.student_head is not None
    labels = torch.zeros(case.student.shape[:-1], dtype=torch.long)
    labels[0, :5] = -100
    num_items = torch.tensor(77)
    upstream = torch.tensor(1.3)
    with pretend.Watch() as watch:
        out = entropy_aware_kl(
            case.student,
            case.teacher,
            **case.arguments,
            labels=labels,
            num_items=num_items,
            schedule=schedule,
            backend=backend,
            workspace_bytes=budget,
            wait_free=True,
        )
        out.loss.backward(upstream)
    assert watch.products and {p.operands for p in watch.products} == {dtype}
    # All but dW [k, D] of a bf16 head, where one chunk has all tokens: it is a product over the tokens, ready as it is.
    rounded = [p for p in watch.products if p.result != torch.float32]
    tokens, (vocab_size, dim) = labels.numel(), case.student_head.weight.shape
    assert all(dtype == p.result == torch.bfloat16 and p.shape[1:] == (tokens, dim) for p in rounded)
    if budget is None:
        assert sum(p.shape[0] for p in rounded) == vocab_size * (dtype == torch.bfloat16)
    assert not watch.upcast, "something of 16 bits was brought to fp32 before a product"


def test_masked_tokens_ride_along_as_zeros() -> None:
    case = make_case(dtype=torch.bfloat16, masked=True)
    assert case.mask is not None
    with torch.no_grad():
        case.student[~case.mask] = torch.nan
        case.teacher[~case.mask] = torch.nan
    loss, grad_hidden, grad_weight = solve(entropy_aware_kl, case, wait_free=True)
    assert loss.isfinite() and grad_weight.isfinite().all()
    assert (grad_hidden[~case.mask] == 0).all() and (grad_hidden[case.mask] != 0).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_operands_and_holds_in_backward(schedule: str, hidden: torch.dtype) -> None:
    case = make_case()
    student = case.student.detach().to(hidden).requires_grad_()
    teacher = case.teacher.to(hidden)
    with pretend.Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            out = entropy_aware_kl(student, teacher, **case.arguments, schedule=schedule)
        out.loss.backward(upstream := upstream_for(out.loss))
    assert {(p.operands, p.result) for p in watch.products} == {(torch.bfloat16, torch.float32)}
    assert out.loss.dtype == torch.float32

    rounded = case.to(torch.bfloat16)
    expected = entropy_aware_kl(rounded.student, rounded.teacher, **rounded.arguments, schedule=schedule)
    assert relative_error(out.loss, expected.loss) < 1e-6
    for leaf, of_rounded in zip((student, *case.leaves[1:]), rounded.leaves, strict=True):
        (gradient,) = torch.autograd.grad(expected.loss, of_rounded, upstream, retain_graph=True)
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, gradient) < 2 * ROUNDING[torch.bfloat16]


def test_autocast_leaves_fp64_alone() -> None:
    case = make_case(dtype=torch.float64)
    plain = solve(entropy_aware_kl, case)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, solve(entropy_aware_kl, case), plain))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fp16_gradients_do_not_underflow_in_a_large_mean(schedule: str) -> None:
    """fp32 leaves under fp16 autocast: only the blocks of gradients are fp16, so that nothing else can underflow."""
    case = make_case()

    def gradients(num_items: int) -> list[Tensor]:
        with torch.autocast("cpu", torch.float16):
            out = entropy_aware_kl(case.student, case.teacher, **case.arguments, num_items=num_items, schedule=schedule)
        return list(torch.autograd.grad(out.loss, case.leaves, torch.tensor(0.9)))

    for of_many, of_one in zip(gradients(10**6), gradients(1), strict=True):
        assert relative_error(of_many * 1e6, of_one) < 1e-5


def test_a_device_without_the_products_upcasts_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "kind", lambda device: "xpu")
    monkeypatch.setattr(products, "found_widening", lambda kind: False)
    case = make_case(dtype=torch.bfloat16)
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    with pretend.Watch() as watch:
        ours = solve(entropy_aware_kl, case)
    assert {p.operands for p in watch.products} == {torch.float32}
    assert relative_error(ours[0], truth[0]) < 3e-6


@pytest.mark.parametrize(("hidden", "weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_operands_of_two_dtypes_meet_in_fp32(hidden: torch.dtype, weight: torch.dtype) -> None:
    x, w = torch.ones(2, 3, dtype=hidden), torch.ones(4, 3, dtype=weight)
    assert products.operand_dtype(x, w, torch.float32) == torch.float32
    assert products.operand_dtype(x, w, torch.float32, torch.float16) == torch.float16
    case = make_case()
    student = case.student.detach().to(hidden).requires_grad_()
    assert case.student_head is not None
    head = LMHead(case.student_head.weight.detach().to(weight).requires_grad_())
    case = replace(case, student=student, student_head=head)
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    for value, exact in zip(solve(entropy_aware_kl, case), truth, strict=True):
        assert relative_error(value, exact) < 2 * ROUNDING[torch.bfloat16]


def sides(n: int, vocab_size: int, dtype: torch.dtype) -> tuple[HiddenSide, HiddenSide]:
    head = LMHead(torch.empty(1, 4, dtype=dtype).expand(vocab_size, 4))
    hidden = torch.empty(1, 4, dtype=dtype).expand(n, 4)
    return HiddenSide(hidden, head, vocab_size), HiddenSide(hidden, head, vocab_size)


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 151_936, 262_144, 600_000])
@pytest.mark.parametrize("n", [1, 512, 1024, 1025, 4096, 8192, 100_000])
def test_chunks_on_a_gpu_are_never_too_small(n: int, vocab_size: int) -> None:
    tokens, columns = tiling(
        "chunked", n, *sides(n, vocab_size, torch.bfloat16), gathered=False, workspace_bytes=None, device=CUDA
    )
    assert columns == vocab_size
    if n <= GPU_USUAL_MIN_TOKENS:
        assert tokens == n
    else:
        assert tokens > GPU_USUAL_MIN_TOKENS / 2
        # fp32 logits of both sides, and the gradient in 16 bits
        assert tokens * vocab_size * (4 + 4 + 2) <= max(GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS * vocab_size * 10)


def test_a_gradient_block_of_its_own_is_in_the_budget() -> None:
    fp32, bf16 = sides(8192, 50_000, torch.float32), sides(8192, 50_000, torch.bfloat16)

    def columns(student: Side, teacher: Side) -> int:
        return tiling("recompute", 8192, student, teacher, gathered=False, workspace_bytes=2**28, device=CUDA).columns

    assert columns(*fp32) == 2**28 // 8192 // 8
    assert columns(*bf16) == 2**28 // 8192 // 10 // 128 * 128
    logits = LogitsSide(torch.empty(1, 50_000, dtype=torch.bfloat16).expand(8192, -1), 50_000)
    assert columns(logits, bf16[1]) == 2**28 // 8192 // 4


class Alone(NamedTuple):
    """A step without its row kernel, on meta tensors: its products."""

    vocab_size: int
    compared: int | None
    schedule: str
    workspace_bytes: int | None

    def products(self) -> list[pretend.Product]:
        n, d_s, d_t = 1500, 64, 96

        def empty(*shape: int, grad: bool = False) -> Tensor:
            return torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=grad)

        case = Case(
            empty(n, d_s, grad=True),
            empty(n, d_t),
            LMHead(empty(self.vocab_size, d_s, grad=True)),
            LMHead(empty(self.vocab_size, d_t)),
        )
        options: dict[str, Any] = {
            "schedule": self.schedule,
            "vocab_size": self.compared,
            "workspace_bytes": self.workspace_bytes,
        }
        with pretend.Watch() as watch:
            entropy_aware_kl(case.student, case.teacher, **case.arguments, **options, backend="torch").loss.backward()
        return watch.products


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("workspace_bytes", [None, 2**24])
@pytest.mark.parametrize(
    ("vocab_size", "compared"), [(50_257, None), (32_001, None), (151_936, None), (50_304, 50_257), (32_001, 31_999)]
)
def test_rows_begin_at_multiples_of_16_bytes(
    vocab_size: int, compared: int | None, workspace_bytes: int | None, schedule: str
) -> None:
    products = Alone(vocab_size, compared, schedule, workspace_bytes).products()
    assert products and {product.alignment for product in products} == {16}


def test_alignment_is_that_of_the_rows() -> None:
    whole = torch.zeros(6, 24, dtype=torch.bfloat16)
    assert pretend.alignment(whole) == pretend.alignment(whole.t()) == pretend.alignment(whole[:, 8:]) == 16
    assert pretend.alignment(whole[:, 4:]) == pretend.alignment(torch.zeros(6, 20, dtype=torch.bfloat16)) == 8
    assert pretend.alignment(torch.zeros(6, 25, dtype=torch.bfloat16).t()) == 2
    assert pretend.alignment(torch.zeros(1, 25, dtype=torch.bfloat16)) == 16


def big_operations(step: Callable[[], None], elements: int) -> list[str]:
    """The operations of a step that write a tensor of so many elements, other than products."""

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            allocates = func._overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
            written = isinstance(result, Tensor) and result.numel() >= elements and not func.is_view
            if written and not allocates and func._overloadpacket not in pretend.PRODUCTS:
                names.append(func._overloadpacket.__name__)
            return result

    names: list[str] = []
    with Writes():
        step()
    return names


def test_the_gradient_of_a_head_is_written_once_more_than_by_products() -> None:
    """The first chunk writes it, the others add to it, and the last pass scales and rounds it: nothing fills it with
    zeros, and nothing copies it."""
    case = make_case(dtype=torch.bfloat16, leading=(2, 8), vocab_size=2000)
    out = []

    def step() -> None:
        out.append(entropy_aware_kl(case.student, case.teacher, **case.arguments, workspace_bytes=1))
        out[0].loss.backward(torch.tensor(1.3))

    assert case.student_head is not None
    names = big_operations(step, case.student_head.weight.numel())
    assert [name for name in names if name != "fill_"] == ["mul"]  # fill_: poisoned memory, see conftest.py


def launches(step: Callable[[], None]) -> int:
    """How many kernels a step launches, its products and row kernels among them: operations that are no views and no
    allocations."""
    made = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            name = func._overloadpacket.__name__
            made += not (func.is_view or name.startswith(("empty", "new_empty", "detach", "lift_fresh", "fill_")))
            return func(*args, **(kwargs or {}))

    with Count():
        step()
    return made


@pytest.mark.parametrize(("kind", "of_one_chunk", "each"), [("hidden", 14, 6), ("logits", 7, 0)])
def test_a_step_is_few_launches(kind: str, of_one_chunk: int, each: int) -> None:
    """docs/gpu.md counts them: a few for all tokens together, and a few for a chunk; figures that nobody reads none."""
    if (reason := BACKENDS["cpu"].unavailable()) is not None:
        pytest.skip(reason)

    def step(chunks: int) -> None:
        case = make_case(dtype=torch.bfloat16, leading=(32 * chunks,), vocab_size=600, student=kind, teacher=kind)
        upstream = torch.tensor(1.3)

        def run() -> None:
            entropy_aware_kl(
                case.student, case.teacher, **case.arguments, workspace_bytes=1, backend="cpu"
            ).loss.backward(upstream)

        found.append(launches(run))

    found: list[int] = []
    for chunks in (1, 2, 4):
        step(chunks)
    assert found[0] <= of_one_chunk
    assert found[1] - found[0] <= each + 3 * bool(each) and found[2] - found[1] == 2 * each


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gradient_filter", [None, 0.1])
def test_every_row_of_a_heads_gradient_is_written(gradient_filter: float | None, schedule: str) -> None:
    """Also those of entries that are not compared, and all of them where no token counts."""
    case = make_case(dtype=torch.bfloat16, masked=True)
    assert case.mask is not None and case.student_head is not None
    for mask in (case.mask, torch.zeros_like(case.mask)):
        for waits in [False, True] if gradient_filter is None else [False]:
            options: dict[str, Any] = {"schedule": schedule, "gradient_filter": gradient_filter, "wait_free": waits}
            _, _, weight = solve(entropy_aware_kl, replace(case, mask=mask), vocab_size=600, **options)
            assert weight.isfinite().all() and (weight[600:] == 0).all()
            assert bool((weight[:600] != 0).any()) == bool(mask.any())


def test_plain_torch_visits_a_gpus_logits_in_few_tiles() -> None:
    logits = torch.empty(8192, 128_256, device="meta")
    assert sum(len(tiles) for _, tiles in row_groups(logits)) <= 64


def test_everything_at_full_size_on_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 8192, Qwen3's vocabulary, heads of 1024 and 4096: products, memory, and that nobody asks for a number."""
    n, vocab_size, d_s, d_t = 8192, 151_936, 1024, 4096

    def empty(*shape: int, grad: bool = False) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=grad)

    student, weight, teacher = empty(n, d_s, grad=True), empty(vocab_size, d_s, grad=True), empty(n, d_t)
    mask = torch.empty(n, dtype=torch.bool, device="meta")
    case = Case(student, teacher, LMHead(weight), LMHead(empty(vocab_size, d_t)), mask)
    tile = 2**20
    monkeypatch.setattr("eopd_kernels.backends.torch.GPU_TILE_ELEMENTS", tile)  # its temporaries are not what is asked
    with pretend.PeakMemory() as memory, pretend.Watch() as watch:
        out = entropy_aware_kl(student, teacher, **case.arguments, backend="torch")
        out.loss.backward()
    flops = sum(2 * m * k * v for (m, k, v), *_ in watch.products)
    assert flops == 2 * n * vocab_size * (3 * d_s + d_t)
    assert len(watch.products) == 4 * 4, "four chunks of 2048 tokens"
    blocks, accumulators = 10 * 2048 * vocab_size, 4 * (vocab_size + n) * d_s
    assert blocks + accumulators < memory.peak < 1.02 * (blocks + accumulators)
