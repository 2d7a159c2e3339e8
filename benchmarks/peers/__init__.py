"""The losses of other packages, each as its users call it on hidden states, where the package is installed.

None computes both divergences under a hard entropy gate; what each computes is said beside it.
"""

from __future__ import annotations

from functools import partial

from . import fla, liger, orda, torchtune, trl
from .linear_cross_entropy import linear_cross_entropy
from .peer import Peer

# Kernels for GPUs, whose traffic and time on one are looked at as well.
PEERS = [
    Peer("trl chunked_divergence, reverse KL", "trl", "reverse", partial(trl.chunked_divergence, beta=1.0)),
    Peer("trl chunked_divergence, JSD", "trl", "jsd", partial(trl.chunked_divergence, beta=0.5)),
    Peer("Liger fused linear JSD", "liger-kernel", "jsd", liger.jsd, gpu_only=True),
    Peer("orda reverse KL", "orda-kernel", "reverse", partial(orda.distillation_loss, divergence="reverse")),
    Peer(
        "orda entropy_adaptive",
        "orda-kernel",
        "soft entropy gate",
        partial(orda.distillation_loss, divergence="entropy_adaptive"),
    ),
    Peer("fla fused_kl_div, forward KL", "flash-linear-attention", "forward", fla.fused_kl_div, gpu_only=True),
]
TORCH_PEERS = [
    Peer("trl GKD, F.kl_div, reverse KL", "trl", "reverse", partial(trl.gkd, beta=1.0)),
    Peer("Liger chunked JSD, β = 1", "liger-kernel", "reverse", liger.chunked_jsd, compiles=True),
    Peer("torchtune chunked reverse KL", "torchtune", "reverse", torchtune.reverse_kl),
    Peer("torchtune chunked forward KL", "torchtune", "soft cross-entropy", torchtune.forward_kl),
    Peer(
        "F.linear_cross_entropy, one head",
        "torch",
        "cross-entropy, one head",
        linear_cross_entropy,
    ),
]

__all__ = ["PEERS", "TORCH_PEERS", "Peer"]
