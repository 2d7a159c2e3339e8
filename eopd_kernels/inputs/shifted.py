"""shifted: from what a batch says of its tokens to what the loss asks of its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dense, described
from .keywords import PER_TOKEN, hint

SHIFTED = ("labels", "mask", *PER_TOKEN)


def shifted(*, ignore_index: int = -100, **per_token: Tensor) -> dict[str, Any]:
    """Moves what a batch says of each token to the position that predicts it, one to the left.

    A causal model's output at position t predicts token t + 1, and the loss takes all it is told to be of a *position*.
    The batches of Hugging Face, and most others, speak of each *token* instead: ``labels[:, t]`` is token t itself.
    Passed as they are, the wrong positions count, with the wrong tokens, and nothing fails. Passed through here they
    mean what they should; student and teacher stay whole, with as many positions as there are tokens.

    Args:
        ignore_index: what ``labels`` get at the last position, which predicts nothing. Default −100.
        **per_token: tensors ``[..., T]`` by the names they have in the loss, in the order of the batch's tokens:
            ``labels``, ``mask``, ``token_ids``, ``old_log_probs``, ``advantages``, ``gate``, ``reverse_weights``,
            ``forward_weights``.

    Returns:
        Keywords of the loss: the same names and shapes. At the last position ``labels`` are ``ignore_index`` and all
        else is 0; where there are neither labels nor mask, a mask leaves that position out. Labels become int64.

    Raises:
        TypeError, ValueError: a name is none of the loss's, or something is no tensor ``[..., T]``.

    Note:
        In a packed batch the last token of a document must not predict the next document's first: give that first token
        the label −100, as the collators do that pack.

    Example::

        batch = {"input_ids": torch.tensor([[5, 3, 7, 2]]), "labels": torch.tensor([[-100, -100, 7, 2]])}
        student, teacher = torch.randn(2, 1, 4, 8)
        out = entropy_aware_kl(student, teacher, **shifted(labels=batch["labels"], token_ids=batch["input_ids"]))
        assert out.valid.tolist() == [[False, True, True, False]]
    """
    for name, tensor in per_token.items():
        if name not in SHIFTED:
            raise TypeError(f"shifted() got an unexpected keyword argument {name!r}{hint(name, SHIFTED)}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {described(tensor)}")
        check_dense(name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have the shape [..., T], got {tuple(tensor.shape)}")
    moved: dict[str, Any] = {
        name: one_to_the_left(tensor.long(), ignore_index) if name == "labels" else one_to_the_left(tensor, 0)
        for name, tensor in per_token.items()
    }
    if moved and "labels" not in moved and "mask" not in moved:
        any_of_them = next(iter(moved.values()))
        moved["mask"] = one_to_the_left(torch.ones_like(any_of_them, dtype=torch.bool), 0)
    return moved


def one_to_the_left(tensor: Tensor, fill: int) -> Tensor:
    """Returns ``tensor[..., 1:]`` and ``fill`` behind it."""
    left = tensor.roll(-1, -1)
    left[..., -1:] = fill
    return left
