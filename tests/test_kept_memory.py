"""Memory of large gradients and blocks is kept for the next call: once nothing uses it, and the system may take it."""

from __future__ import annotations

import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from eopd_kernels import LMHead, entropy_aware_kl, kept_memory
from eopd_kernels.testing import pretend
from tests.conftest import logits_like

CPU = torch.device("cpu")
SHAPE = (60, 30_000)  # 7.2 MB
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system has no MADV_FREE")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """And torch does not fill what it hands out."""
    torch.use_deterministic_algorithms(False)
    kept_memory.GRADIENTS.clear()
    kept_memory.BLOCKS.clear()
    yield
    kept_memory.GRADIENTS.clear()
    kept_memory.BLOCKS.clear()


def gradient(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    student = logits_like(generator, *shape).requires_grad_()
    teacher = logits_like(generator, *shape)
    (found,) = torch.autograd.grad(entropy_aware_kl(student, teacher).loss, student)
    return found


def test_the_next_gradient_lies_where_the_last_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kept_memory.SWITCH, "0")
    expected = [gradient(0), gradient(1)]
    monkeypatch.delenv(kept_memory.SWITCH)
    first = gradient(0)
    place = first.data_ptr()
    assert torch.equal(first, expected[0])
    del first
    second = gradient(1)
    assert second.data_ptr() == place and torch.equal(second, expected[1])


def taken_as_grad(found: Tensor) -> Tensor:
    leaf = torch.zeros(SHAPE, requires_grad=True)
    leaf.backward(found)
    return leaf


USES: dict[str, Callable[[Tensor], Any]] = {
    "detached": lambda found: found.detach(),
    "row": lambda found: found[3],
    "numpy": lambda found: found.numpy(),
    "grad": taken_as_grad,
    "storage": lambda found: found.untyped_storage(),
}


@pytest.mark.parametrize("way", USES)
def test_memory_in_use_is_not_handed_out(way: str) -> None:
    found = gradient()
    used, before = USES[way](found), found.clone()
    del found
    others = [gradient(seed) for seed in (1, 2)]
    after = torch.empty(0).set_(used).view(SHAPE) if way == "storage" else used.grad if way == "grad" else used
    assert torch.equal(torch.as_tensor(after), before[3] if way == "row" else before)
    assert len({other.data_ptr() for other in others}) == 2


def test_one_stretch_is_kept_of_about_the_size() -> None:
    several = [gradient(seed) for seed in range(3)]
    del several
    assert [len(memory) for memory in kept_memory.GRADIENTS] == [4 * 60 * 30_000]
    smaller = kept_memory.empty((40, 30_000), torch.float32, CPU)
    assert not kept_memory.GRADIENTS and smaller.shape == (40, 30_000)
    del smaller
    assert len(kept_memory.GRADIENTS) == 1
    much_larger = kept_memory.empty((150, 30_000), torch.float32, CPU)  # what is too small is let go
    assert not kept_memory.GRADIENTS
    del much_larger
    much_smaller = kept_memory.empty((36, 30_000), torch.float32, CPU)
    assert not kept_memory.GRADIENTS
    del much_smaller  # which did not lie in what was kept
    assert [len(memory) for memory in kept_memory.GRADIENTS] == [4 * 36 * 30_000]


@pytest.mark.skipif(sys.platform != "linux", reason="read in /proc")
def test_the_system_may_take_what_is_kept() -> None:
    def lazily_free() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))

    found = gradient()
    before = lazily_free()
    del found
    assert lazily_free() - before > 5000  # KiB


def test_a_heads_gradient_is_kept_too() -> None:
    weight = torch.randn(40_000, 32, requires_grad=True)
    teacher, places = torch.randn(3, 40_000), []
    for _ in range(3):
        loss = entropy_aware_kl(torch.randn(3, 32), teacher, student_head=LMHead(weight)).loss
        (found,) = torch.autograd.grad(loss, weight)
        assert found.isfinite().all() and found.abs().max() < 10
        places.append(found.data_ptr())
        found.fill_(torch.nan)
        del found
    assert places[0] == places[1] == places[2]


def step(dtype: torch.dtype, tokens: int = 100, seed: int = 0) -> list[Tensor]:
    """Gradients of hidden states and head: blocks of 8.4 MB; a dW of 10.7 MB, which several chunks make in fp32."""
    of: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": dtype}
    student, teacher = (torch.randn(tokens, 64, **of) for _ in range(2))
    weight, other = (torch.randn(42_000, 64, **of) for _ in range(2))
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    heads: dict[str, Any] = {"student_head": LMHead(weight), "teacher_head": LMHead(other)}
    out = entropy_aware_kl(student, teacher, **heads, workspace_bytes=24 * 2**20)
    return list(torch.autograd.grad(out.loss, leaves))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of new stretches of memory."""
    sizes: list[int] = []
    fresh = kept_memory.fresh

    def counted(nbytes: int) -> mmap.mmap:
        sizes.append(nbytes)
        return fresh(nbytes)

    monkeypatch.setattr(kept_memory, "fresh", counted)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [50, 100], ids=["one chunk", "two chunks"])
def test_the_next_calls_blocks_lie_where_the_last_ones_did(
    tokens: int, dtype: torch.dtype, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kept_memory.SWITCH, "0")
    expected = step(dtype, tokens)
    assert not made
    monkeypatch.delenv(kept_memory.SWITCH)
    step(dtype, tokens, seed=1)
    step(dtype, tokens, seed=2)  # in which one chunk finds a gradient, and room was not made for it
    assert 3 <= len(made) <= 5
    made.clear()
    for memory in (*kept_memory.GRADIENTS, *kept_memory.BLOCKS):
        memory[:] = b"\xff" * len(memory)  # NaN in any dtype
    found = step(dtype, tokens)
    assert not made and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(kept_memory.BLOCKS) <= 3 and len(kept_memory.GRADIENTS) <= 1


def test_blocks_make_room_for_a_larger_gradient_and_lend_it_their_memory(made: list[int]) -> None:
    def some(kept: deque[mmap.mmap], *sizes: int) -> None:
        tensors = [kept_memory.empty((size * 2**20,), torch.uint8, CPU, kept) for size in sizes]
        del tensors

    def kept_by(kept: deque[mmap.mmap]) -> list[int]:
        return [len(memory) >> 20 for memory in kept]

    some(kept_memory.BLOCKS, 16, 8)
    some(kept_memory.GRADIENTS, 8)
    assert made == [size * 2**20 for size in (16, 8)] and not kept_memory.GRADIENTS
    assert kept_by(kept_memory.BLOCKS) == [16, 8]  # it was given back to where it was from
    some(kept_memory.BLOCKS, 5)  # any that has the size
    assert len(made) == 2 and kept_by(kept_memory.BLOCKS) == [16, 8]
    some(kept_memory.GRADIENTS, 4, 6)  # 4 lies in the block of 8, and 6 would waste that of 16, which makes room for it
    assert made[2:] == [6 * 2**20] and kept_by(kept_memory.GRADIENTS) == [6] and kept_by(kept_memory.BLOCKS) == [8]
    some(kept_memory.BLOCKS, 5, 5)  # no block lies in a gradient's memory
    assert made[3:] == [5 * 2**20] and kept_by(kept_memory.GRADIENTS) == [6]
    some(kept_memory.GRADIENTS, 50)
    assert kept_by(kept_memory.GRADIENTS) == [50] and not kept_memory.BLOCKS
    some(kept_memory.BLOCKS, 16, 16)
    some(kept_memory.GRADIENTS, 5)  # one of them is room enough
    assert kept_by(kept_memory.GRADIENTS) == [5] and kept_by(kept_memory.BLOCKS) == [16]
    some(kept_memory.GRADIENTS, 50)
    some(kept_memory.BLOCKS, 10, 10, 10, 10)
    assert kept_by(kept_memory.GRADIENTS) == [50] and kept_by(kept_memory.BLOCKS) == [10] * 3
    some(kept_memory.BLOCKS, 4)  # those of another size are let go
    assert kept_by(kept_memory.BLOCKS) == [4]


def test_what_is_rounded_lies_in_a_block_or_the_blocks_make_room(made: list[int]) -> None:
    def rounded(size: int) -> Tensor:
        return kept_memory.cast(torch.full((size * 2**18,), 1 / 3), torch.bfloat16)  # of half the MiB

    blocks = [kept_memory.empty((size * 2**20,), torch.uint8, CPU, kept_memory.BLOCKS) for size in (6, 9)]
    places = [block.data_ptr() for block in blocks]
    del blocks
    found = rounded(16)
    assert found.data_ptr() == places[1] and (found == torch.tensor(1 / 3).bfloat16()).all() and len(made) == 2
    assert rounded(6).data_ptr() not in places and rounded(12).data_ptr() == places[0]
    del found
    assert len(kept_memory.BLOCKS) == 2 and not kept_memory.GRADIENTS
    assert rounded(60).dtype == torch.bfloat16 and not kept_memory.BLOCKS
    same = torch.zeros(3 * 2**20)
    assert kept_memory.cast(same, torch.float32) is same


def test_what_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept_of(shape: tuple[int, ...] = SHAPE) -> int:
        tensor = kept_memory.empty(shape, torch.float32, CPU)
        assert tensor.shape == shape
        del tensor
        return len(kept_memory.GRADIENTS)

    assert kept_of((3, 1000)) == 0 and kept_of((0, 5)) == 0
    monkeypatch.setenv(kept_memory.SWITCH, "0")
    assert kept_of() == 0
    monkeypatch.delenv(kept_memory.SWITCH)
    with pretend.gpu():
        assert kept_of() == 0
    torch.use_deterministic_algorithms(True)
    assert kept_memory.empty(SHAPE, torch.float32, CPU).isnan().all() and not kept_memory.GRADIENTS
    torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setattr(kept_memory, "fresh", lambda nbytes: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
        assert kept_of() == 0
    assert kept_of() == 1


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.filterwarnings("error")
def test_fake_tensors_have_fake_gradients(hidden: bool, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large: they have no memory, and no address that the system could be told of."""
    monkeypatch.setenv(kept_memory.SWITCH, switch)
    with FakeTensorMode():
        leaf = torch.randn(SHAPE[1], 60, requires_grad=True) if hidden else torch.randn(SHAPE, requires_grad=True)
        student, head = (torch.randn(60, 60), LMHead(leaf)) if hidden else (leaf, None)
        (found,) = torch.autograd.grad(entropy_aware_kl(student, torch.randn(SHAPE), student_head=head).loss, leaf)
    assert isinstance(found, FakeTensor) and found.shape == leaf.shape and not kept_memory.GRADIENTS


def test_threads_share_nothing() -> None:
    """Two threads that take and give back never hold the same memory."""
    clashes = []

    def work(number: float) -> None:
        for _ in range(50):
            tensor = kept_memory.empty(SHAPE, torch.float32, CPU)
            tensor[::7, ::4096] = number
            if not (tensor[::7, ::4096] == number).all():
                clashes.append(number)
            del tensor

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
