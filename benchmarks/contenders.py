"""The lines of the tables: ours, the plain code, the losses of other packages, and the least work there is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from eopd_kernels import Objective, entropy_aware_kl
from eopd_kernels.schedules.workspace import WORKSPACE_BYTES

from . import peers, plain, steps
from .problems import LogitsProblem
from .steps import Step

FLOOR = "floor"


@dataclass(frozen=True)
class Contender:
    """Something that is measured. It must be picklable, because a new process is given it.

    Args:
        name: as in the tables.
        objective: a key of :data:`benchmarks.truth.OBJECTIVES` or words; FLOOR for less than a loss.
        loss: the mean over tokens of a problem; None where nothing is differentiated, and no memory reported.
        prepare: from a problem to the step that is timed, with memory for its result; default: loss and gradients.
        package: the distribution that has to be installed; None for code of this project.
        compiles: its first call of a shape compiles, which counts neither as its time nor as its memory.
        gpu_only: it has no path for a CPU.
    """

    name: str
    objective: str
    loss: Callable[[Any], Tensor] | None = None
    prepare: Callable[[Any], Step] | None = None
    package: str | None = None
    compiles: bool = False
    gpu_only: bool = False

    def step(self, problem: Any) -> Step:
        """Returns the step that is timed."""
        if self.prepare is not None:
            return self.prepare(problem)
        assert self.loss is not None
        return steps.of_loss(self.loss, problem)

    @property
    def version(self) -> str | None:
        """The version of the package: "" where none is needed, None where it is not installed."""
        try:
            return "" if self.package is None else importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def refusal(self, device: str) -> str | None:
        """Returns why there is no point in a try, or None."""
        if self.version is None:
            return f"not installed: {self.package}"
        return "for GPUs only" if self.gpu_only and device == "cpu" else None


def ours(problem: LogitsProblem, **options: Any) -> Tensor:
    """entropy_aware_kl with these options."""
    return entropy_aware_kl(problem.student, problem.teacher, **problem.heads, **options).loss


def our(backend: str, **options: Any) -> Contender:
    """entropy_aware_kl with one of its backends."""
    words = ", ".join([f"{OURS} {backend}", *map(str, options.values())])
    return Contender(words, "gated", partial(ours, backend=backend, **options))


def ours_inplace(problem: LogitsProblem) -> Tensor:
    """entropy_aware_kl of a copy of the logits, in whose memory it puts the gradient."""
    return entropy_aware_kl(problem.student * 1, problem.teacher, inplace=True).loss


def plain_loss(problem: LogitsProblem) -> Tensor:
    return plain.loss(*problem.sides.values())


def compiled_loss(problem: LogitsProblem) -> Tensor:
    return compiled()(*problem.sides.values())


@cache
def compiled() -> Callable[..., Any]:
    """Compiles the plain loss, once per process; a new shape compiles anew."""
    return torch.compile(plain.loss, fullgraph=True, dynamic=False)


def named(*contenders: Contender) -> dict[str, Contender]:
    return {contender.name: contender for contender in contenders}


OURS, OURS_REVERSE, OURS_FORWARD = "eopd_kernels", "eopd_kernels, reverse KL", "eopd_kernels, forward KL"
# Ours under each objective; others are compared with the one that computes the same.
ALL_OURS = (OURS, OURS_REVERSE, OURS_FORWARD)
PRODUCTS, UNCHUNKED = "four products, chunked alike", "four products, all tokens at once"
PLAIN, COMPILED = "plain PyTorch", "torch.compile"
GKD, TRL, LIGER = "trl GKD, F.kl_div, reverse KL", "trl chunked_divergence, reverse KL", "Liger chunked JSD, β = 1"
ORDA, ORDA_GATED = "orda reverse KL", "orda entropy_adaptive"
TUNE, TUNE_FORWARD, FLA = "torchtune chunked reverse KL", "torchtune chunked forward KL", "fla fused_kl_div, forward KL"
TRL_JSD, LIGER_JSD, LCE = "trl chunked_divergence, JSD", "Liger fused linear JSD", "F.linear_cross_entropy, one head"
INPLACE, ADD, KERNEL = "eopd_kernels, inplace=True", "torch.add(a, b, out=c)", "row_loss_and_gradient into out"
TOUCH, HUGE = "first touch of a new gradient", "first touch in huge pages"
BACKWARD, BACKWARD_FILTERED = "two backward products", "two backward products, gradient_filter=2^-12"
FILTERED = {exponent: f"eopd_kernels, gradient_filter=2^-{exponent}" for exponent in (10, 12, 14, 16)}
# Within the usual budget for the blocks of logits, which the default exceeds where the least chunk is larger.
BUDGETED = f"{OURS_REVERSE}, workspace_bytes={WORKSPACE_BYTES >> 20} MiB"
# The lines of this project among which no best peer is looked for, and those of them that are exact.
OURS_EXACT = (*ALL_OURS, INPLACE, BUDGETED)
NO_PEER = (*OURS_EXACT, *FILTERED.values())
SCALED, DX_BF16, DX_FP32 = "gradient scaled in place", "the product behind dX, bf16", "the product behind dX, fp32"
# In each round the quickest peer comes right after ours, so that both meet what disturbs the machine for seconds.
GATED = (OURS, COMPILED, PLAIN, ORDA_GATED)
REVERSE = (OURS_REVERSE, LIGER, TRL, GKD, ORDA, TUNE)
FORWARD = (OURS_FORWARD, TUNE_FORWARD, FLA, TRL_JSD, LIGER_JSD)

# The peers with kernels for GPUs, whose traffic and time on one are looked at as well.
GPU_PEERS = [
    Contender(TRL, "reverse", partial(peers.trl_chunked_divergence, beta=1.0), package="trl"),
    Contender(TRL_JSD, "jsd", partial(peers.trl_chunked_divergence, beta=0.5), package="trl"),
    Contender(LIGER_JSD, "jsd", peers.liger_jsd, package="liger-kernel", gpu_only=True),
    Contender(ORDA, "reverse", partial(peers.orda, divergence="reverse"), package="orda-kernel"),
    Contender(ORDA_GATED, "soft entropy gate", peers.orda, package="orda-kernel"),
    Contender(FLA, "forward", peers.fla_fused_kl_div, package="flash-linear-attention", gpu_only=True),
]
TORCH_PEERS = [
    Contender(GKD, "reverse", partial(peers.trl_gkd, beta=1.0), package="trl"),
    Contender(LIGER, "reverse", peers.liger_chunked_jsd, package="liger-kernel", compiles=True),
    Contender(TUNE, "reverse", peers.torchtune_reverse_kl, package="torchtune"),
    Contender(TUNE_FORWARD, "soft cross-entropy", peers.torchtune_forward_kl, package="torchtune"),
    Contender(LCE, "cross-entropy, one head", peers.linear_cross_entropy, package="torch"),
]
OURS_REVERSE_KL = Contender(OURS_REVERSE, "reverse", partial(ours, objective=Objective.reverse_kl()))
HIDDEN = named(
    Contender(PRODUCTS, FLOOR, prepare=steps.products),
    Contender(UNCHUNKED, FLOOR, prepare=partial(steps.products, chunked=False)),
    Contender(OURS, "gated", ours),
    Contender(PLAIN, "gated", plain_loss),
    Contender(COMPILED, "gated", compiled_loss, compiles=True),
    OURS_REVERSE_KL,
    Contender(OURS_FORWARD, "forward", partial(ours, objective=Objective.forward_kl())),
    Contender(BUDGETED, "reverse", partial(ours, objective=Objective.reverse_kl(), workspace_bytes=WORKSPACE_BYTES)),
    *(Contender(name, "gated", partial(ours, gradient_filter=2.0**-k)) for k, name in FILTERED.items()),
    Contender(BACKWARD, FLOOR, prepare=steps.backward_products),
    Contender(BACKWARD_FILTERED, FLOOR, prepare=partial(steps.backward_products, gradient_filter=2.0**-12)),
    *TORCH_PEERS,
    *GPU_PEERS,
    Contender(DX_BF16, FLOOR, prepare=partial(steps.grad_hidden_product, dtype=torch.bfloat16)),
    Contender(DX_FP32, FLOOR, prepare=partial(steps.grad_hidden_product, dtype=torch.float32)),
)
LOGITS = named(
    Contender(ADD, FLOOR, prepare=steps.add),
    Contender(KERNEL, "gated", prepare=steps.row_kernel),
    Contender(OURS, "gated", ours),
    Contender(INPLACE, "gated", ours_inplace, steps.inplace_logits),
    Contender(PLAIN, "gated", plain_loss),
    Contender(COMPILED, "gated", compiled_loss, compiles=True),
    OURS_REVERSE_KL,
    Contender(GKD, "reverse", partial(peers.trl_gkd_of_logits, beta=1.0), package="trl"),
    Contender(TOUCH, FLOOR, prepare=steps.first_touch),
    Contender(HUGE, FLOOR, prepare=steps.first_touch_in_huge_pages),
    Contender(SCALED, FLOOR, prepare=steps.scale_in_place),
)

# What is timed on a GPU, a process per group, and in the order of importance: time may run out.
GPU_GROUPS = {
    "ours": (our("cuda"), our("triton"), HIDDEN[PLAIN], our("cuda", schedule="recompute")),
    "liger": (HIDDEN[LIGER], HIDDEN[LIGER_JSD]),
    "peers": tuple(peer for peer in GPU_PEERS if peer.name != LIGER_JSD),
}
