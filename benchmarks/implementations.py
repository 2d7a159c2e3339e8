"""Everything that can stand in a table: ours, the plain code, the peers, and the least work there is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eopd_kernels import Objective
from eopd_kernels.schedules.workspace import WORKSPACE_BYTES

from . import losses, steps
from .peers import PEERS, TORCH_PEERS, Peer
from .peers.trl import gkd_of_logits
from .steps import Step

FLOOR = "floor"
# Tokens of the single product that is timed in bf16 and in fp32.
PRODUCT_TOKENS = 128


@dataclass(frozen=True)
class Implementation:
    """One contender of a case; a new process gets it whole, so that it must be picklable.

    Args:
        name: as in the tables.
        objective: a key of :data:`benchmarks.truth.OBJECTIVES` or words; FLOOR for less than a loss.
        loss: the mean over tokens of a problem; None where nothing is differentiated, and no memory reported.
        prepare: from a problem to the step that is timed, with memory for its result; default: loss and gradients.
        package: the distribution that has to be installed.
        compiles, gpu_only: see :class:`benchmarks.peers.Peer`.
    """

    name: str
    objective: str
    loss: Callable[[Any], Tensor] | None = None
    prepare: Callable[[Any], Step] | None = None
    package: str | None = None
    compiles: bool = False
    gpu_only: bool = False

    def step(self, problem: Any) -> Step:
        """What is timed."""
        if self.prepare is not None:
            return self.prepare(problem)
        assert self.loss is not None
        return steps.of_loss(self.loss, problem)

    @property
    def version(self) -> str | None:
        """Of the package, "" where none is needed, None where it is not installed."""
        try:
            return "" if self.package is None else importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def refusal(self, device: str) -> str | None:
        """Why there is no point in a try."""
        if self.version is None:
            return f"not installed: {self.package}"
        return "for GPUs only" if self.gpu_only and device == "cpu" else None


def of_peer(peer: Peer) -> Implementation:
    return Implementation(
        peer.name,
        peer.divergence,
        peer.loss,
        package=peer.package,
        compiles=peer.compiles,
        gpu_only=peer.gpu_only,
    )


def named(implementations: Iterable[Implementation]) -> dict[str, Implementation]:
    return {implementation.name: implementation for implementation in implementations}


OURS, OURS_REVERSE, OURS_FORWARD = "eopd_kernels", "eopd_kernels, reverse KL", "eopd_kernels, forward KL"
# Ours under each objective; others are compared with the one that computes the same.
ALL_OURS = (OURS, OURS_REVERSE, OURS_FORWARD)
PRODUCTS, UNCHUNKED = "four products, chunked alike", "four products, all tokens at once"
PLAIN, COMPILED = "plain PyTorch", "torch.compile"
GKD, TRL, LIGER = "trl GKD, F.kl_div, reverse KL", "trl chunked_divergence, reverse KL", "Liger chunked JSD, β = 1"
ORDA, ORDA_GATED = "orda reverse KL", "orda entropy_adaptive"
INPLACE, ADD, KERNEL = "eopd_kernels, inplace=True", "torch.add(a, b, out=c)", "row_loss_and_gradient into out"
TOUCH, HUGE = "first touch of a new gradient", "first touch in huge pages"
BACKWARD, BACKWARD_FILTERED = "two backward products", "two backward products, gradient_filter=2^-12"
FILTERED = {exponent: f"eopd_kernels, gradient_filter=2^-{exponent}" for exponent in (10, 12, 14, 16)}
# Within the usual budget for the blocks of logits, which the default exceeds where the least chunk is larger.
BUDGETED = f"{OURS_REVERSE}, workspace_bytes={WORKSPACE_BYTES >> 20} MiB"
# What no peer is, and which of it is exact.
OURS_EXACT = (*ALL_OURS, INPLACE, BUDGETED)
NO_PEER = (*OURS_EXACT, *FILTERED.values())
SCALED, DX_BF16, DX_FP32 = "gradient scaled in place", "the product behind dX, bf16", "the product behind dX, fp32"

HIDDEN = named(
    [
        Implementation(PRODUCTS, FLOOR, prepare=steps.products),
        Implementation(UNCHUNKED, FLOOR, prepare=steps.unchunked_products),
        Implementation(OURS, "gated", losses.fused_hidden),
        Implementation(PLAIN, "gated", losses.plain_hidden),
        Implementation(COMPILED, "gated", losses.compiled_hidden, compiles=True),
        Implementation(OURS_REVERSE, "reverse", partial(losses.fused_hidden, objective=Objective.reverse_kl())),
        Implementation(OURS_FORWARD, "forward", partial(losses.fused_hidden, objective=Objective.forward_kl())),
        Implementation(
            BUDGETED,
            "reverse",
            partial(losses.fused_hidden, objective=Objective.reverse_kl(), workspace_bytes=WORKSPACE_BYTES),
        ),
        *(
            Implementation(name, "gated", partial(losses.fused_hidden, gradient_filter=2.0**-exponent))
            for exponent, name in FILTERED.items()
        ),
        Implementation(BACKWARD, FLOOR, prepare=steps.backward_products),
        Implementation(BACKWARD_FILTERED, FLOOR, prepare=partial(steps.backward_products, gradient_filter=2.0**-12)),
        *map(of_peer, [*TORCH_PEERS, *PEERS]),
        *(
            Implementation(name, FLOOR, prepare=partial(steps.grad_hidden_product, tokens=PRODUCT_TOKENS, dtype=dtype))
            for name, dtype in ((DX_BF16, torch.bfloat16), (DX_FP32, torch.float32))
        ),
    ]
)
LOGITS = named(
    [
        Implementation(ADD, FLOOR, prepare=steps.add),
        Implementation(KERNEL, "gated", prepare=steps.row_kernel),
        Implementation(OURS, "gated", losses.fused_logits),
        Implementation(INPLACE, "gated", losses.inplace_logits, steps.inplace_logits),
        Implementation(PLAIN, "gated", losses.plain_logits),
        Implementation(COMPILED, "gated", losses.compiled_logits, compiles=True),
        Implementation(OURS_REVERSE, "reverse", partial(losses.fused_logits, objective=Objective.reverse_kl())),
        Implementation(GKD, "reverse", partial(gkd_of_logits, beta=1.0), package="trl"),
        Implementation(TOUCH, FLOOR, prepare=steps.first_touch),
        Implementation(HUGE, FLOOR, prepare=steps.first_touch_in_huge_pages),
        Implementation(SCALED, FLOOR, prepare=steps.scale_in_place),
    ]
)
