"""LMHead: hidden states to a block of full-precision logits, and the two products back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..arguments import check_floating, check_integer, described, finite
from ..distributed.data_parallel import check_not_partitioned, is_dtensor, rows_at, whole
from ..distributed.vocabulary import local_tensor
from . import products
from .from_model import parts_of

# Rows of a low-precision head that are upcast at a time: on a CPU the copy stays in the last-level cache.
PANEL_BYTES = 8 * 2**20
# On a GPU, where only operands of two different dtypes need it, few launches matter more: 8,192 rows at D = 4096. Not
# measured.
GPU_PANEL_BYTES = 128 * 2**20


class LMHead:
    """The last layer of a language model, as the loss needs it: logits = softcap·tanh(scale·(X Wᵀ + bias) / softcap).

    Args:
        weight: ``[V, D]``, any floating dtype; for ``nn.Linear`` its ``.weight`` as it is. A DTensor (FSDP2) is
            gathered once per call of the loss, in its own dtype, which a mixed-precision policy leaves at fp32, and its
            gradient is one, averaged over the ranks of its mesh; under a ``tensor_parallel_group`` it stays where it
            is. V is 0 at most on a rank of such a group that holds nothing of the vocabulary.
        bias: ``[V]`` or None (default).
        scale: multiplies the logits before the softcap, finite and not 0. Default 1.0
            (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: the final logit softcap > 0, or None (default) for none (Gemma 2's ``final_logit_softcapping``).

    Raises:
        TypeError, ValueError: a tensor is not floating or has the wrong shape, or a number is outside its range.

    Example::

        lm_head = torch.nn.Linear(8, 50, bias=False)
        head = LMHead(lm_head.weight, softcap=30.0)  # a gradient reaches lm_head.weight
        entropy_aware_kl(torch.randn(3, 8), torch.randn(3, 50), student_head=head).loss.backward()
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        check_floating("LMHead.weight", weight, "LMHead.from_model(model) takes a model")
        check_not_partitioned("LMHead.weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"LMHead.weight must have the shape [V, D] with V >= 1, got {tuple(weight.shape)}")
        if bias is not None:
            check_floating("LMHead.bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"LMHead.bias must have the shape [V] = [{len(weight)}], got {tuple(bias.shape)}")
        self.weight = weight  # [V, D]
        self.bias = bias  # [V]
        self.scale = finite("LMHead.scale", scale)
        if self.scale == 0:
            raise ValueError("LMHead.scale must not be 0")
        self.softcap = None if softcap is None else finite("LMHead.softcap", softcap, above=0.0)

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """The head of a transformers causal language model: applied to its last hidden state it gives its logits.

        That is the ``last_hidden_state`` of the model's backbone; ``hidden_states[-1]`` is the same in every family of
        transformers 5.24 that was tried but Gemma 3n, where it holds several predictions.

        Reads the model's class and config for a logit scale (Cohere, Falcon-H1, Granite, ...) and a final softcap
        (Gemma, ...); nothing of transformers is imported. The weight is the model's own parameter, tied or not, so that
        gradients reach it; call this again after the model's output layer was replaced or resized.
        With a LoRA adapter on the output layer it is base + scaling·B·A, computed here: gradients reach A and B, and it
        is to be called for every step. A sharded weight (FSDP2) stays the DTensor it is.

        Args:
            model: anything with ``get_output_embeddings()`` and a ``config``, also inside torch.compile, data
                parallelism or PEFT.

        Raises:
            TypeError: ``model`` is not such a model.
            ValueError: its logits cannot be expressed, or what happens to them is not known: no output embeddings, an
                adapter on the output layer other than plain LoRA or with dropout, a quantised weight or one that FSDP1
                or ZeRO-3 have partitioned, a layer before it, an encoder-decoder, or a
                class that is not known here whose config has a field like ``logit_scale``. The message says which, and
                what to do instead.
        """
        weight, bias, scale, softcap = parts_of(model)
        return cls(weight, bias, scale=scale, softcap=softcap)

    def select(self, ids: Tensor) -> LMHead:
        """Returns the head of some entries of the vocabulary: its logits are this head's at ``ids``, in that order.

        Their softmax is over these entries alone: probabilities are renormalised, entropies and KLs those of that.
        Whatever names an entry in a call of the loss is then a place in ``ids``: ``token_ids``, the ids of a
        ``TopKTeacher``, ``vocab_size``.

        The rows are copied as they are now, and gradients reach the whole weight and bias through the copy: select
        again for each call that trains. For the first entries of a head ``vocab_size=`` of the loss needs no copy.

        Args:
            ids: ``[k]`` integer, k >= 1, from 0 to V − 1, each at most once, on any device. On a CPU, as
                :func:`common_entries` gives them, this is checked; elsewhere looking would wait for the device. Of a
                DTensor they are entries of the whole vocabulary, the same on every rank: the weight is gathered here,
                and the selected head's is a DTensor of the same placement. A rank's shard that is a plain tensor has
                no other entries than its own rows, from 0.

        Raises:
            TypeError: ``ids`` is not an integer tensor.
            ValueError: it is not ``[k]`` with k >= 1, has an entry that the weight has no row for, or one twice; or
                the weight is partitioned by DeepSpeed ZeRO-3.

        Example::

            student_head, teacher_head = LMHead(torch.randn(50, 8)), LMHead(torch.randn(60, 12))
            student_ids, teacher_ids = torch.tensor([0, 3, 4]), torch.tensor([7, 2, 59])  # the same three tokens
            heads = {"student_head": student_head.select(student_ids), "teacher_head": teacher_head.select(teacher_ids)}
            out = entropy_aware_kl(torch.randn(5, 8), torch.randn(5, 12), **heads)
        """
        check_not_partitioned("LMHead.weight", self.weight)
        check_ids(ids, len(self.weight))
        ids = ids.to(self.weight.device, torch.int64)
        return self.with_tensors(rows_at(self.weight, ids), None if self.bias is None else rows_at(self.bias, ids))

    def __repr__(self) -> str:
        return (
            f"LMHead(weight={described(self.weight)}, bias={self.bias is not None}, "
            f"scale={self.scale:g}, softcap={self.softcap})"
        )

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Writes X Wᵀ + bias of ``hidden`` [n, D] for the entries ``columns`` of the vocabulary to ``out`` [n, k]."""
        for part, weight in self._panels(columns, hidden.dtype):
            products.project(hidden, weight, out=out[:, part])
        if self.bias is not None:
            out.add_(self.bias[columns])
        return out

    def grad_hidden(self, grad_logits: Tensor, columns: slice, out: Tensor) -> None:
        """``out`` [n, D] += ``grad_logits`` [n, k] · W[columns]."""
        for part, weight in self._panels(columns, grad_logits.dtype):
            products.add_mm(grad_logits[:, part], weight, out=out)

    def cast(self, dtype: torch.dtype) -> LMHead:
        """Returns the head with its weight in another dtype; itself where it has that already."""
        if self.weight.dtype == dtype:
            return self
        return self.with_tensors(self.weight.to(dtype), self.bias)

    def gathered(self) -> LMHead:
        """Returns the head with its whole weight and bias on each rank: one collective for each that is a DTensor."""
        if not (is_dtensor(self.weight) or is_dtensor(self.bias)):
            return self
        bias = None if self.bias is None else whole(self.bias)
        return self.with_tensors(whole(self.weight), bias)

    def with_tensors(self, weight: Tensor, bias: Tensor | None) -> LMHead:
        """Returns a head of another weight and bias that does the same to its logits."""
        return LMHead(weight, bias, scale=self.scale, softcap=self.softcap)

    def _panels(self, columns: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields the head's rows ``columns`` in ``dtype``, with their places in the slice.

        They come whole where they have it already, else copied a panel at a time into one buffer, so that a head is
        never upcast as a whole.
        """
        weight = self.weight[columns]
        if weight.dtype == dtype:
            yield slice(0, len(weight)), weight
            return
        for part, panel in panels(len(weight), weight.shape[1], dtype, weight.device):
            yield part, panel.copy_(weight[part])


def check_ids(ids: Any, vocab_size: int) -> None:
    """Refuses what are no entries of a head, each at most once."""
    name = "ids of LMHead.select"
    check_integer(name, ids)
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"{name} must have the shape [k] with k >= 1, got {tuple(ids.shape)}")
    if not tensors.readable(ids):
        return
    low, high = ids.long().aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} must be from 0 to {vocab_size - 1}, the rows of its weight, got {described(ids)} with others: "
            "leave out what a tokenizer has beyond its model's rows"
        )
    if ids.long().bincount().max() > 1:
        raise ValueError(
            f"{name} must name each entry once, got {described(ids)} with repetitions, which would count twice: leave "
            "them out, on the other side as well"
        )


def tensors_of(head: LMHead | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns a head's weight and bias; (None, None) for a side that is logits."""
    return (None, None) if head is None else (head.weight, head.bias)


def transform(head: LMHead | None, temperature: float) -> tuple[float, float, float]:
    """Returns scale, softcap (0: none) and temperature of a side's logits, as the row functions take them."""
    return (1.0, 0.0, temperature) if head is None else (head.scale, head.softcap or 0.0, temperature)


def grad_weight(grad_logits: Tensor, hidden: Tensor, out: Tensor, add: bool = True) -> None:
    """``out`` [k, D] += ``grad_logits`` [n, k]ᵀ · ``hidden`` [n, D], in the accumulator's own precision.

    Without ``add`` it is written, whatever was there; in 16 bits it is rounded once, from sums in fp32 or fp64. A GPU's
    products do that for operands of its dtype; elsewhere it takes a panel of the sums at a time.
    """
    product = products.add_mm if add else products.mm
    wide = torch.float32 if grad_logits.dtype in products.LOW_PRECISION else grad_logits.dtype
    if out.dtype == wide or (out.dtype == grad_logits.dtype and not tensors.on_host(out.device)):
        product(grad_logits.t(), hidden, out=out)
        return
    assert not add, "what is rounded cannot be added to"
    for part, panel in panels(len(out), out.shape[1], wide, out.device):
        products.mm(grad_logits[:, part].t(), hidden, out=panel)
        out[part] = panel


def panels(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yields parts of a matrix ``[rows, width]`` with memory for each, which is the same for all."""
    panel_bytes = PANEL_BYTES if tensors.on_host(device) else GPU_PANEL_BYTES
    # In sixteens, so that a panel's columns of the logits begin at a multiple of 16 bytes.
    panel_rows = max(1, panel_bytes // (width * dtype.itemsize or 1) // 16) * 16
    buffer = torch.empty(min(panel_rows, rows), width, dtype=dtype, device=device)
    for start in range(0, rows, panel_rows):
        part = slice(start, min(start + panel_rows, rows))
        yield part, buffer[: part.stop - start]


def local_head(name: str, head: Any, group: Any) -> Any:
    """Returns a head whose tensors are this rank's shards."""
    if not isinstance(head, LMHead):
        return head
    weight = local_tensor(f"{name}.weight", head.weight, group, 0)
    bias = local_tensor(f"{name}.bias", head.bias, group, 0)
    if weight is head.weight and bias is head.bias:
        return head
    return head.with_tensors(weight, bias)
