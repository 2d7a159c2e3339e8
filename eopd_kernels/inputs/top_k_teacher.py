"""TopKTeacher: a teacher of which only the likeliest entries are known, as inference servers hand them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dense, check_floating, check_integer, described
from ..row_math.statistics import times_or_zero


class TopKTeacher:
    """The teacher's k likeliest entries per token and their log-probabilities over its whole vocabulary.

    Args:
        ids: ``[..., k]`` integer, entries of the vocabulary; −1 marks a missing one. A repeated entry counts once.
        log_probs: ``[..., k]`` floating, nats, ≤ 0 up to rounding (0.125, which a CPU checks where they count); −inf
            marks a missing entry, NaN is a NaN of the loss. Taken as they are: a temperature is the server's to apply.
        entropy: ``[...]`` floating, the teacher's entropy in nats where the server gives it, else None (default): then
            the gate uses a lower bound, the entropy with everything outside the k entries as one more class.
        valid: ``[..., k]`` bool, False marks a missing entry too, or None (default).
        token_log_probs: ``[...]`` floating, nats, ≤ 0 likewise: log q of the sampled token, which a sampled reverse
            half needs; or None: then it is known where the token is among the entries.

    Raises:
        TypeError, ValueError: a tensor is not what is stated above.

    Example::

        log_probs, ids = torch.randn(3, 50).log_softmax(-1).topk(4)
        objective = Objective(reverse="none", forward=TopK(teacher="raw", tail=True))
        out = entropy_aware_kl(torch.randn(3, 50), TopKTeacher(ids, log_probs), objective=objective)
        assert out.teacher_entropy_is_lower_bound
    """

    def __init__(
        self,
        ids: Tensor,
        log_probs: Tensor,
        entropy: Tensor | None = None,
        valid: Tensor | None = None,
        token_log_probs: Tensor | None = None,
    ) -> None:
        check_integer("TopKTeacher.ids", ids)
        if ids.dim() < 1 or ids.shape[-1] == 0:
            raise ValueError(f"TopKTeacher.ids must have the shape [..., k] with k >= 1, got {tuple(ids.shape)}")
        floating: dict[str, Any] = {"log_probs": log_probs, "entropy": entropy, "token_log_probs": token_log_probs}
        for name, tensor in floating.items():
            if tensor is None and name != "log_probs":
                continue
            check_floating(f"TopKTeacher.{name}", tensor)
            shape = ids.shape if name == "log_probs" else ids.shape[:-1]
            if tensor.shape != shape:
                raise ValueError(
                    f"TopKTeacher.{name} must have the shape {tuple(shape)} of ids {tuple(ids.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
        if valid is not None:
            if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
                raise TypeError(f"TopKTeacher.valid must be a bool tensor or None, got {described(valid)}")
            check_dense("TopKTeacher.valid", valid)
            if valid.shape != ids.shape:
                raise ValueError(
                    f"TopKTeacher.valid must have the shape of ids {tuple(ids.shape)}, got {tuple(valid.shape)}"
                )
        self.ids = ids
        self.log_probs = log_probs
        self.entropy = entropy
        self.valid = valid
        self.token_log_probs = token_log_probs

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by name."""
        names = ("ids", "log_probs", "entropy", "valid", "token_log_probs")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        return f"TopKTeacher({', '.join(f'{name}={described(tensor)}' for name, tensor in self.tensors.items())})"


def present_entries(ids: Tensor, log_probs: Tensor, valid: Tensor | None) -> Tensor:
    """Returns which of the entries ``[n, k]`` count: not marked as missing, and of a repeated one the first."""
    present = (ids >= 0) & (log_probs != -torch.inf)  # a NaN is there, and is seen in the loss
    if valid is not None:
        present &= valid
    # A missing entry must not shadow a present one of the same id: it gets an id of its own.
    apart = torch.where(present, ids, -1 - torch.arange(ids.shape[1], device=ids.device))
    ordered, order = apart.sort(dim=1, stable=True)
    first = torch.ones_like(present)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return present & torch.empty_like(first).scatter_(1, order, first)


def entropy_lower_bound(log_probs: Tensor, present: Tensor) -> Tensor:
    """Returns a lower bound of the entropy in nats, ``[n]``: that of the entries ``[n, k]`` and one class for the rest,
    which has at least the entropy of one class."""
    q = torch.where(present, log_probs, -torch.inf).exp()
    rest = (1 - q.sum(1)).clamp_min(0)
    return -times_or_zero(q, log_probs).sum(1) - times_or_zero(rest, rest.log())


def log_prob_of(token_ids: Tensor, ids: Tensor, log_probs: Tensor, present: Tensor) -> Tensor:
    """Returns the log-probabilities ``[n]`` of tokens as far as they are among the entries ``[n, k]``, else NaN."""
    same = present & (ids == token_ids.unsqueeze(1))
    return torch.where(same.any(1), torch.where(same, log_probs, 0.0).sum(1), torch.nan)
