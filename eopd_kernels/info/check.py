"""The self-test of an installation: each available backend against the reference in fp64, and beside plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from .. import reference
from ..heads.lm_head import LMHead
from ..loss import entropy_aware_kl
from ..objective.halves import Sampled
from ..objective.objective import Objective
from ..rows import BACKENDS

# Objective and schedule.
CASES: dict[str, tuple[Objective, str]] = {
    "the default": (Objective(), "chunked"),
    "recompute": (Objective(), "recompute"),
    "JSD": (Objective.jsd(0.3), "chunked"),
    "sampled and top k": (Objective.eopd_paper(), "chunked"),
}
# Of the largest value of loss and gradients, in fp32. Seen were 2e-5 and less, as of the reference itself in fp32.
MOST_ERROR = 1e-4
# Tokens, entries, hidden sizes: to be timed, plain PyTorch needs some six blocks of N × V.
SIZES = {"cpu": (256, 32_768, 128), "gpu": (2_048, 65_536, 1_024)}
# As many as a busy machine gets through in some seconds.
ROUNDS, ENOUGH_SECONDS = 3, 4.0


def check() -> Iterator[tuple[str, bool]]:
    """Yields a line for each backend on each device, and whether it is right."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # as exact as the reference; the process is the check's own
    devices = [torch.device("cpu")]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        devices.append(accelerator)
    for device in devices:
        names = [name for name, of in BACKENDS.items() if of.unavailable() is None and of.takes(device)]
        for name in names:
            try:
                worst, case = largest_error(name, device)
                right = worst < MOST_ERROR  # false of NaN
                said = f"{'ok' if right else 'WRONG'}: within {worst:.0e} of fp64 ({case})"
                if right:
                    said += f"; {speed(name, device)}"
            except Exception as error:  # whatever a kernel or its compiler raises is the finding
                right, said = False, f"FAILED: {type(error).__name__}: {error}"
            yield f"  {device.type:<5} {name:<7} {said}", right


def largest_error(backend: str, device: torch.device) -> tuple[float, str]:
    """The largest error of loss and gradients in any case, of the largest value there, and the case it was in."""
    few = device.type == "cpu" and not native_to(device, backend)
    arguments = problem(6 if few else 96, 2_003, torch.device("cpu"))
    errors = []
    for case, (objective, schedule) in CASES.items():
        truth = loss_and_gradients(reference.entropy_aware_kl, objective, moved(arguments, torch.float64))
        function = partial(entropy_aware_kl, schedule=schedule, backend=backend)
        found = loss_and_gradients(function, objective, moved(arguments, torch.float32, device))
        for value, exact in zip(found, truth, strict=True):
            error = float((value.cpu().double() - exact).abs().max() / exact.abs().max())
            errors.append((float("inf") if error != error else error, case))
    return max(errors)


def native_to(device: torch.device, backend: str) -> bool:
    """Whether these kernels were made for the device: Triton's interpreter and emulated CUDA kernels are not."""
    return backend in ("torch", "cpu" if device.type == "cpu" else backend)


def problem(tokens: int, vocab_size: int, device: torch.device, sizes: tuple[int, int] = (24, 40)) -> dict[str, Tensor]:
    """Hidden states and heads whose rows are sharp and flat in turn, a mask, and sampled tokens; fp32."""
    generator = torch.Generator().manual_seed(0)
    drawn: Any = {"generator": generator, "dtype": torch.float32, "device": generator.device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **drawn)

    sharpness = 12 * torch.rand(tokens, 1, **drawn)  # so that the gate is open on some of the rows
    made = {
        "student": sharpness * normal(tokens, sizes[0]),
        "teacher": sharpness * normal(tokens, sizes[1]),
        "student_weight": normal(vocab_size, sizes[0]) / sizes[0] ** 0.5,
        "teacher_weight": normal(vocab_size, sizes[1]) / sizes[1] ** 0.5,
        "mask": torch.rand(tokens, **drawn) > 0.3,
        "token_ids": torch.randint(vocab_size, (tokens,), generator=generator),
        "old_log_probs": normal(tokens) - 7,
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def moved(tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | None = None) -> dict[str, Tensor]:
    """Copies of the tensors on a device, those of floating point in this dtype."""
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}


def loss_and_gradients(function: Callable[..., Any], objective: Objective, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss of a call, and the gradients of hidden states and weight."""
    student, weight = given["student"].requires_grad_(), given["student_weight"].requires_grad_()
    sampled = {n: given[n] for n in ("token_ids", "old_log_probs") if isinstance(objective.reverse, Sampled)}
    heads = {"student_head": LMHead(weight), "teacher_head": LMHead(given["teacher_weight"])}
    loss = function(student, given["teacher"], **heads, mask=given["mask"], objective=objective, **sampled).loss
    return [loss.detach(), *torch.autograd.grad(loss, (student, weight))]


def plain(student: Tensor, teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor) -> Tensor:
    """The default loss as one writes it by hand, all logits in memory."""
    log_p = log_softmax(linear(student, student_weight), -1)
    with torch.no_grad():
        log_q = log_softmax(linear(teacher, teacher_weight), -1)
        q = log_q.exp()
        gate = -(q * log_q).sum(-1) > 0.8
    log_ratio = log_p - log_q
    return ((log_p.exp() * log_ratio).sum(-1) - gate * (q * log_ratio).sum(-1)).mean()


def speed(backend: str, device: torch.device) -> str:
    """How long loss and gradients take beside plain PyTorch, each the best of a few rounds in turn, in words."""
    if not native_to(device, backend):
        return "not timed: these kernels are emulated on a CPU"
    tokens, vocab_size, width = SIZES["cpu" if device.type == "cpu" else "gpu"]
    given = problem(tokens, vocab_size, device, (width, width))
    student, teacher = given["student"].requires_grad_(), given["teacher"]
    weight, teacher_weight = given["student_weight"].requires_grad_(), given["teacher_weight"]
    heads: Any = {"student_head": LMHead(weight), "teacher_head": LMHead(teacher_weight)}
    contenders: list[Callable[[], Tensor]] = [
        lambda: entropy_aware_kl(student, teacher, **heads, backend=backend).loss,
        lambda: plain(student, teacher, weight, teacher_weight),
    ]
    best = [float("inf")] * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where others use the cores too, threads that wait for each other say little
    start = time.perf_counter()
    for round_ in range(1 + ROUNDS):  # the first one warms up
        if round_ > 1 and time.perf_counter() - start > ENOUGH_SECONDS:
            break
        for index, contender in enumerate(contenders):
            taken = seconds(contender, (student, weight), device)
            best[index] = min(best[index], taken) if round_ else best[index]
    torch.set_num_threads(threads)
    ours, theirs = best
    ratio = f"{theirs / ours:.2g}x as fast as" if theirs > ours else f"{ours / theirs:.2g}x slower than"
    where = " on one thread" if device.type == "cpu" else ""
    return f"{ratio} plain PyTorch{where} ({1e3 * ours:.3g} ms, {1e3 * theirs:.3g} ms)"


def seconds(contender: Callable[[], Tensor], leaves: tuple[Tensor, ...], device: torch.device) -> float:
    """How long one call and its gradients take."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    torch.autograd.grad(contender(), leaves)
    wait()
    return time.perf_counter() - start
