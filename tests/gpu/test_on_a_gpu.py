"""The loss on real hardware: as exact as the specification, without a wait, in a graph, within its memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, entropy_aware_kl, reference
from eopd_kernels.heads import products
from eopd_kernels.schedules.workspace import GPU_USUAL_MIN_TOKENS, GPU_WORKSPACE_BYTES
from tests.conftest import Case, make_case, relative_error
from tests.gpu.conftest import moved

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SIDES = [("logits", "logits"), ("hidden", "hidden"), ("hidden", "logits"), ("logits", "hidden")]
SCHEDULES = ["chunked", "recompute"]
UPSTREAM = 1.7


def solve(function: Any, case: Case, **options: Any) -> list[Tensor]:
    """Loss and gradients, under an upstream gradient that is not 1."""
    out = function(case.student, case.teacher, **case.arguments, **options)
    upstream = torch.full_like(out.loss, UPSTREAM)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, case.leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("student", "teacher"), SIDES)
def test_as_exact_as_the_specification(
    student: str, teacher: str, schedule: str, dtype: torch.dtype, on_gpu: str, cuda: torch.device
) -> None:
    case = make_case(student=student, teacher=teacher, dtype=dtype, bias=True, masked=True, vocab_size=5003)
    truth = solve(reference.entropy_aware_kl, case.to(torch.float64))
    ours = solve(entropy_aware_kl, moved(case, cuda), schedule=schedule, backend=on_gpu, workspace_bytes=2**20)
    inside = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(ours[0].cpu(), truth[0]) < inside
    for leaf, value, exact in zip(case.leaves, ours[1:], truth[1:], strict=True):
        assert value.dtype == leaf.dtype
        assert relative_error(value.cpu(), exact) < inside + 3 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_not_rounded(dtype: torch.dtype, cuda: torch.device) -> None:
    assert products.widening(cuda, torch.bfloat16)
    generator = torch.Generator(cuda).manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator, device=cuda).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    products.mm(a, b, out=(out := torch.empty(300, 300, device=cuda)))
    assert relative_error(out, exact) < 1e-5
    products.add_mm(a, b, out=out)
    assert relative_error(out, 2 * exact) < 1e-5
    products.add_mm(a.t(), b, out=(accumulated := torch.ones(300, 300, device=cuda)))
    assert relative_error(accumulated, 1 + a.double().t() @ b.double()) < 1e-5


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("student", ["hidden", "logits"])
def test_nothing_waits_for_the_device(student: str, schedule: str, on_gpu: str, cuda: torch.device) -> None:
    case = moved(make_case(student=student, dtype=torch.bfloat16, masked=True), cuda)
    labels = torch.zeros(case.student.shape[:-1], dtype=torch.long, device=cuda)
    num_items = torch.tensor(77, device=cuda)
    options = {"schedule": schedule, "backend": on_gpu, "labels": labels, "num_items": num_items, "wait_free": True}
    solve(entropy_aware_kl, case, **options)  # compiles
    torch.cuda.synchronize()
    with no_synchronisation():
        solve(entropy_aware_kl, case, **options)


@pytest.mark.parametrize("student", ["hidden", "logits"])
def test_a_captured_graph_replays(student: str, on_gpu: str, cuda: torch.device) -> None:
    case = moved(make_case(0, student=student, dtype=torch.bfloat16, masked=True), cuda)
    other = moved(make_case(1, student=student, dtype=torch.bfloat16, masked=True), cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            solve(entropy_aware_kl, case, backend=on_gpu)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(entropy_aware_kl, case, backend=on_gpu)

    assert case.mask is not None and other.mask is not None
    with torch.no_grad():
        case.student.copy_(other.student)
        case.teacher.copy_(other.teacher)
        case.mask.copy_(other.mask)
    graph.replay()
    for value, expected in zip(captured, solve(entropy_aware_kl, case, backend=on_gpu), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_memory_keeps_to_the_budget(cuda: torch.device) -> None:
    n, vocab_size, dim = 8192, 50_000, 512

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=cuda, dtype=torch.bfloat16)

    student, weight = random(n, dim).requires_grad_(), random(vocab_size, dim).requires_grad_()
    teacher, heads = random(n, dim), (LMHead(weight), LMHead(random(vocab_size, dim)))

    def step() -> None:
        student.grad = weight.grad = None
        entropy_aware_kl(student, teacher, student_head=heads[0], teacher_head=heads[1]).loss.backward()

    torch.use_deterministic_algorithms(False)  # nor poisoned memory, which is not the loss's
    step()
    student.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    blocks = max(GPU_WORKSPACE_BYTES, 10 * vocab_size * GPU_USUAL_MIN_TOKENS)
    assert peak <= 1.05 * (blocks + (4 + 2) * dim * (n + vocab_size)) + 64 * 2**20


def compiled() -> int:
    """How many times Triton has compiled a kernel of the package in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("eopd_kernels.backends.triton")]
    values = [value for module in modules for value in vars(module).values()]
    members = [k for value in values for k in (value if isinstance(value, tuple) else [value])]
    kernels = {id(kernel): kernel for kernel in members if hasattr(kernel, "device_caches")}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


def test_no_batch_size_is_compiled_for(cuda: torch.device) -> None:
    pytest.importorskip("triton")

    def run(n: int) -> None:
        logits = torch.randn(n, 2, 4096, device=cuda)
        entropy_aware_kl(logits[:, 0].clone().requires_grad_(), logits[:, 1].clone(), backend="triton").loss.backward()

    run(1000)
    before = compiled()
    for n in (1001, 1024, 1600, 4096):
        run(n)
    assert compiled() == before > 0


def test_offsets_beyond_32_bits(on_gpu: str, cuda: torch.device) -> None:
    n, vocab_size = 14_200, 151_936  # more than 2^31 entries
    if on_gpu == "torch" or torch.cuda.get_device_properties(cuda).total_memory < 30 * 2**30:
        pytest.skip("for kernels, and wants 24 GB")
    torch.use_deterministic_algorithms(False)
    student = torch.randn(n, vocab_size, device=cuda, dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(n, vocab_size, device=cuda, dtype=torch.bfloat16)
    out = entropy_aware_kl(student, teacher, backend=on_gpu, reduction="sum")
    out.loss.backward()
    last = student.detach()[-3:].clone().requires_grad_()
    expected = entropy_aware_kl(last, teacher[-3:], backend="torch", reduction="sum")
    expected.loss.backward()
    assert relative_error(out.reverse_kl[-3:], expected.reverse_kl) < 1e-5
    assert student.grad is not None and last.grad is not None
    assert relative_error(student.grad[-3:], last.grad) < 2**-7


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_decides_the_operands(schedule: str, on_gpu: str, cuda: torch.device) -> None:
    case = moved(make_case(), cuda)
    with torch.autocast("cuda", torch.bfloat16):
        out = entropy_aware_kl(case.student, case.teacher, **case.arguments, schedule=schedule, backend=on_gpu)
    gradients = torch.autograd.grad(out.loss, case.leaves, torch.full_like(out.loss, UPSTREAM))
    rounded = solve(entropy_aware_kl, case.to(torch.bfloat16), schedule=schedule, backend=on_gpu)
    assert out.loss.dtype == torch.float32 and relative_error(out.loss, rounded[0]) < 1e-5
    for leaf, value, expected in zip(case.leaves, gradients, rounded[1:], strict=True):
        assert value.dtype == leaf.dtype and relative_error(value, expected) < 2**-7
