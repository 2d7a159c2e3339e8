"""What every test starts from: the backends, poisoned memory, and problems spread like real logits."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from eopd_kernels.testing import emulation, interpreter
from tests import quick_interpreter

interpreter.switch_on()  # before anything imports Triton
quick_interpreter.switch_on()
if not torch.cuda.is_available():
    emulation.switch_on()

# ruff: noqa: E402
from eopd_kernels import EntropyGate, LMHead, Objective, TopKTeacher
from eopd_kernels.backends import triton
from eopd_kernels.heads.lm_head import tensors_of
from eopd_kernels.rows import BACKENDS
from tests.canaries import Guarded, guarded_tensors

# The problems are small: a second thread would only wait, here and in programs that a test starts. Tests of threading
# set the number they need.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "suite",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


# What takes a test process 20 seconds or more, the longest first, where Triton has compiled nothing yet: files, and
# classes of files that test processes share.
LONGEST = [
    "tests/backends/test_triton_static.py::TestAllCallsApartOnOneGPU",
    "tests/backends/test_triton_static.py::TestAllFusedCallsOnOneGPU",
    "tests/backends/test_triton_static.py::TestAChoiceOnEveryGPU",
    "tests/test_compile_options.py",
    "tests/backends/test_triton_static.py::TestAllMixturesOnOneGPU",
    "tests/python/test_distill_processes.py",
    "tests/test_compile.py",
    "tests/backends/test_cuda_static.py",
    "tests/benchmarks/test_gpu_run.py",
    "tests/test_objectives.py",
    "tests/backends/test_cuda_rows.py",
    "tests/test_gpu_path.py",
    "tests/python/test_distill_resume.py",
    "tests/test_rows.py",
    "tests/test_rows_mixture.py",
    "tests/benchmarks/test_smollm2.py",
    "tests/test_memory.py",
    "tests/backends/test_triton_rows.py",
    "tests/test_served_teacher.py",
    "tests/test_oracle.py",
    "tests/test_opcheck.py",
    "tests/test_loss.py",
    "tests/test_newcomer.py",
    "tests/python/test_held_out.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Test processes begin with the longest, so that none of them still has minutes to go when the others are done."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.rsplit("::", 1)[0], len(places)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: a garbage collection in a test need not look through all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays() -> None:
    """Nor through what the files before have imported and compiled."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries would report all of it as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills whatever torch.empty returns with NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; skipped with the reason where it is not available."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param!r} is not available: {reason}")
    if request.node.get_closest_marker("many_rows") and request.param in ("triton", "cuda"):
        pytest.skip("thousands of rows take Triton's interpreter, or emulated CUDA, minutes")
    return request.param


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    """Makes tensors between canaries, and checks them when the test is over."""
    with guarded_tensors() as guard:
        yield guard


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call of the loss. ``head=None`` means that the side is logits."""

    student: Tensor
    teacher: Any  # Tensor, or a TopKTeacher
    student_head: LMHead | None = None
    teacher_head: LMHead | None = None
    mask: Tensor | None = None
    objective: Objective = field(default_factory=lambda: Objective(gate=EntropyGate(2.0), alpha=0.7))
    per_token: dict[str, Tensor] = field(default_factory=dict)  # token_ids, old_log_probs, gate, ...

    @property
    def arguments(self) -> dict[str, Any]:
        """What follows student and teacher."""
        names = ("student_head", "teacher_head", "mask", "objective")
        return {**{name: getattr(self, name) for name in names}, **self.per_token}

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradient is asked for: the student's, its weight, its bias."""
        tensors = (self.student, *tensors_of(self.student_head))
        return [t for t in tensors if t is not None and t.requires_grad]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as new leaves."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        def head(of: LMHead | None) -> LMHead | None:
            if of is None:
                return None
            weight = cast(of.weight)
            assert weight is not None
            return LMHead(weight, cast(of.bias), scale=of.scale, softcap=of.softcap)

        student = cast(self.student)
        teacher = self.teacher if isinstance(self.teacher, TopKTeacher) else cast(self.teacher)
        assert student is not None and teacher is not None
        return replace(
            self,
            student=student,
            teacher=teacher,
            student_head=head(self.student_head),
            teacher_head=head(self.teacher_head),
        )


def logits_like(generator: torch.Generator, *shape: int, spread: float = 6.0) -> Tensor:
    """Signed fp32 numbers spread like logits, each row with a sharpness and an offset of its own, so that the rows'
    entropies lie on both sides of a gate."""
    sharpness = spread * torch.rand(*shape[:-1], 1, generator=generator) + 0.1
    offset = 5 * torch.randn(*shape[:-1], 1, generator=generator)
    return torch.randn(*shape, generator=generator) * sharpness + offset


def make_case(
    seed: int = 0,
    *,
    leading: tuple[int, ...] = (3, 37),
    vocab_size: int = 611,
    student: str = "hidden",
    teacher: str = "hidden",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    masked: bool = False,
    noise: float = 1.0,
    **objective: Any,
) -> Case:
    """A problem in which teacher and student agree to within ``noise``, and the gate is open on some rows only."""
    generator = torch.Generator().manual_seed(seed)
    shared = logits_like(generator, *leading, vocab_size)

    def side(kind: str, dim: int, grad: bool) -> tuple[Tensor, LMHead | None]:
        if kind == "logits":
            logits = shared + noise * torch.randn(*leading, vocab_size, generator=generator)
            return logits.to(dtype).requires_grad_(grad), None
        hidden = logits_like(generator, *leading, dim)
        weight = torch.randn(vocab_size, dim, generator=generator) / dim**0.5
        head_bias = torch.randn(vocab_size, generator=generator).to(dtype).requires_grad_(grad) if bias else None
        return hidden.to(dtype).requires_grad_(grad), LMHead(weight.to(dtype).requires_grad_(grad), head_bias)

    student_rows, student_head = side(student, 24, True)
    teacher_rows, teacher_head = side(teacher, 40, False)
    mask = torch.rand(*leading, generator=generator) > 0.3 if masked else None
    options = {"gate": EntropyGate(2.0), "alpha": 0.7, **objective}
    return Case(student_rows, teacher_rows, student_head, teacher_head, mask, Objective(**options))


def interpreted(backend: str) -> bool:
    """Whether a row takes a backend's kernels 10 ms, because Triton's interpreter runs them."""
    return backend == "triton" and triton.takes(torch.device("cpu"))


def size(backend: str) -> dict[str, Any]:
    """The size of ``make_case`` on a backend: of interpreted kernels fewer rows, and longer ones, because a tile holds
    1,024 columns; of emulated ones, which run a thread after the other, a chunk of 32 rows and a ragged one."""
    if interpreted(backend):
        return {"leading": (3, 4), "vocab_size": 1300}
    if backend == "cuda" and not torch.cuda.is_available():
        return {"leading": (3, 13)}
    return {}


def columns_of_tiles(backend: str) -> int:
    """A vocabulary of several of a kernel's tiles and a ragged end; of Triton's interpreter, two tiles and an end."""
    return 2503 if interpreted(backend) else 5003


def skip_unless(telling: bool, backend: str) -> None:
    """Where kernels are interpreted, only what is telling: other cases call the same kernels under other torch."""
    if interpreted(backend) and not telling:
        pytest.skip("calls no kernel that another case does not, slowly")


def upstream_for(loss: Tensor, seed: int = 1) -> Tensor:
    """An upstream gradient that is never 1: signed, and of each token its own."""
    generator = torch.Generator().manual_seed(seed)
    return (1.7 * torch.randn(loss.shape, generator=generator) - 0.6).to(loss.dtype)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value − truth| over the largest |truth|, in fp64; NaN counts as infinitely wrong."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    error = (value - truth).abs().max() / truth.abs().max().clamp_min(1e-30)
    return float("inf") if error.isnan() else float(error)
