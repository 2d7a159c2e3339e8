"""Checks of what a caller says of each token, and of a teacher that is a few entries per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from .. import tensors
from ..arguments import check_dense, described
from ..objective.halves import Sampled, TopK
from ..objective.objective import Objective
from ..tensors import rows_of
from .record import Tokens
from .top_k_teacher import TopKTeacher, entropy_lower_bound, log_prob_of, present_entries

# The most that log 1 may come to: a difference of two bf16 numbers near 16, as some servers compute it.
ROUNDED_LOG_PROB = 0.125
NOTHING_SAID = Tokens()  # made once: a call of few tokens would notice
MASK_DTYPES = "bool, integer or floating"


def token_weights(
    student: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Returns the weights ``[N]`` in the compute dtype: the mask's value, 0 where the label is ``ignore_index``."""
    leading = student.shape[:-1]
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {described(tensor)}")
        if tensor.shape != leading:
            raise ValueError(f"{name} must have the leading shape {tuple(leading)}, got {tuple(tensor.shape)}")
        check_dense(name, tensor)
    if mask is not None and mask.is_complex():
        raise TypeError(f"mask must be a {MASK_DTYPES} tensor, got {described(mask)}")
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be an integer tensor, got {described(labels)}")
    weights = torch.ones(leading, dtype=dtype, device=student.device) if mask is None else mask.detach().to(dtype)
    # Labels of a type without negative numbers hold no negative ignore_index, whatever their bits would be in another.
    if labels is not None and ignore_index >= torch.iinfo(labels.dtype).min:
        weights = torch.where(labels.long() == ignore_index, 0.0, weights)
    if mask is not None and mask.dtype != torch.bool:
        check_weights(weights)
    return rows_of(weights)


def denominator(
    weights: Tensor, num_items: int | float | Tensor | None, reduction: str, all_count: bool
) -> Tensor | None:
    """Returns what the sum over tokens is divided by: ``num_items``, else the number of valid tokens; 1 if it is 0.

    Args:
        all_count: whether no token can have weight 0, so that there is nothing to count.
    """
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f"num_items replaces the count of reduction='mean', got reduction={reduction!r} with it")
        return None
    if num_items is None and all_count and not torch.compiler.is_compiling():  # there the number may be symbolic
        return weights.new_full((), max(1, len(weights)))
    if num_items is None:
        count = (weights != 0).sum()
    elif isinstance(num_items, Tensor):
        check_dense("num_items", num_items)
        if num_items.numel() != 1 or num_items.is_complex():
            raise ValueError(f"num_items must be a number or a tensor of one element, got {described(num_items)}")
        count = num_items.detach().reshape(())
        check_count(count)
        if count.device != weights.device:
            check_movable(count, weights.device)
            count = count.to(weights.device, non_blocking=True)
    else:
        if isinstance(num_items, bool) or not isinstance(num_items, Real):
            raise TypeError(f"num_items must be a number, a 0-d tensor or None, got {described(num_items)}")
        if not 0 <= num_items < math.inf:
            raise ValueError(f"num_items must be finite and at least 0, got {num_items!r}")
        count = weights.new_ones(()) * num_items
    return torch.where(count == 0, 1, count).to(weights.dtype)


def check_count(count: Tensor) -> None:
    """Refuses a number of items below 0 or infinite: with a ValueError on a CPU, else with the device's own assertion,
    because looking would wait for the device."""
    if tensors.readable(count):
        if not 0 <= count.item() < math.inf:
            raise ValueError("num_items must be finite and at least 0, got a tensor whose number is not")
    elif not torch.compiler.is_compiling():  # compiled.py asks when there are numbers to look at
        torch._assert_async((count >= 0) & (count < math.inf))


def check_weights(weights: Tensor) -> None:
    """Refuses weights of tokens below 0, infinite or NaN, on a CPU; elsewhere looking would wait for the device."""
    if tensors.readable(weights) and not ((weights >= 0) & (weights < math.inf)).all():
        raise ValueError(
            "mask must be finite and at least 0 where it counts, 0 for what is left out, got a tensor with other "
            "numbers: of an additive attention mask (0 and -inf) pass mask == 0"
        )


def check_movable(count: Tensor, device: torch.device) -> None:
    """Refuses a count on a GPU beside CPU tensors, which torch does not take either: the host would wait for it."""
    if tensors.on_host(device) and not tensors.on_host(count.device):
        raise ValueError(f"all tensors must be on one device, got student on {device} and num_items on {count.device}")


def check_sparse_teacher(teacher: TopKTeacher, head: object, objective: Objective, advantages: object) -> None:
    """Refuses what a :class:`TopKTeacher` cannot be asked for."""
    if head is not None:
        raise ValueError(f"teacher_head must be None with a TopKTeacher, got {described(head)}")
    if not (objective.reverse == "none" or isinstance(objective.reverse, Sampled | TopK)):
        raise ValueError(
            "Objective.reverse must be 'sampled', a TopK or 'none' with a TopKTeacher, whose log-probabilities are "
            f"known at a few entries only, got {objective.reverse!r}"
        )
    if not (objective.forward == "none" or isinstance(objective.forward, TopK)):
        raise ValueError(
            "Objective.forward must be 'top_k', a TopK or 'none' with a TopKTeacher, whose log-probabilities are known "
            f"at a few entries only, got {objective.forward!r}"
        )
    if "student" in objective.top_k:
        raise ValueError(
            "TopK.of must be 'teacher' with a TopKTeacher, whose log-probabilities are known at a few entries only, "
            "got 'student'"
        )
    if objective.temperatures[1] != 1:
        raise ValueError(
            "Objective.temperature must be 1 for the teacher with a TopKTeacher, whose log_probs are taken as they "
            f"are, got {objective.temperatures[1]:g}"
        )
    if isinstance(objective.reverse, Sampled) and teacher.token_log_probs is None and advantages is None:
        raise ValueError(
            "Objective.reverse='sampled' with a TopKTeacher needs its token_log_probs, or advantages=, got None"
        )


def check_no_teacher(head: object, objective: Objective, given: Mapping[str, object]) -> None:
    """Refuses what needs a teacher where there is none: a sampled reverse half with advantages is all there can be."""
    if head is not None:
        raise ValueError(f"teacher_head must be None without a teacher, got {described(head)}")
    if not isinstance(objective.reverse, Sampled) or objective.forward != "none":
        raise ValueError(
            "teacher=None needs Objective.reverse='sampled' and forward='none', got "
            f"reverse={objective.reverse!r} and forward={objective.forward!r}: pass a teacher"
        )
    if given["advantages"] is None:
        raise ValueError(
            "teacher=None needs advantages= of the leading shape in place of log q(y) − log p_old(y), got None"
        )
    if given["gate"] is None and getattr(objective.gate, "of", "student") == "teacher":
        raise ValueError(
            "teacher=None needs an Objective.gate that looks at no teacher, such as 'never' in "
            f"Objective.on_policy_distillation(), got {objective.gate!r}"
        )


def tokens_of(
    given: Mapping[str, Tensor | None],
    teacher: TopKTeacher | None,
    objective: Objective,
    weights: Tensor,
    leading: torch.Size,
) -> Tokens:
    """Returns what was said of each token, ``[N, ...]``: numbers in the compute dtype, harmless where the weight is 0.

    Args:
        given: ``token_ids``, ``old_log_probs``, ``advantages``, ``gate``, ``reverse_weights``, ``forward_weights`` as
            they came.
    """
    for name, tensor in given.items():
        if tensor is None:
            continue
        kind = "integer" if name == "token_ids" else "real"
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise TypeError(f"{name} must be a tensor of {kind} numbers or None, got {described(tensor)}")
        if name == "token_ids" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise TypeError(f"token_ids must be an integer tensor, got {described(tensor)}")
        if tensor.shape != leading:
            raise ValueError(f"{name} must have the leading shape {tuple(leading)}, got {tuple(tensor.shape)}")
        check_dense(name, tensor)
    if objective.cross_entropy != 0 and given["token_ids"] is None:
        raise ValueError(
            f"Objective.cross_entropy={objective.cross_entropy:g} needs labels= or token_ids= of the leading shape, "
            "got None"
        )
    if isinstance(objective.reverse, Sampled):
        for name in ("token_ids", "old_log_probs"):
            if given[name] is None:
                raise ValueError(f"Objective.reverse='sampled' needs {name}= of the leading shape, got None")
    elif given["advantages"] is not None:
        raise ValueError(
            f"advantages= are those of Objective.reverse='sampled', got reverse={objective.reverse!r} with them"
        )

    if teacher is None and all(tensor is None for tensor in given.values()):
        return NOTHING_SAID
    unused = weights == 0

    def numbers(tensor: Tensor | None) -> Tensor | None:
        """Returns numbers as ``[N]`` in the compute dtype."""
        return None if tensor is None else rows_of(tensor.detach().to(weights.dtype)).masked_fill(unused, 0.0)

    token_ids = given["token_ids"]
    if token_ids is not None:
        token_ids = rows_of(token_ids.long()).masked_fill(unused, 0)
    tokens = {name: numbers(tensor) for name, tensor in given.items() if name != "token_ids"}
    if (old_log_probs := tokens["old_log_probs"]) is not None:
        check_log_probs("old_log_probs", old_log_probs)
    if teacher is None:
        return Tokens(token_ids, **tokens)

    k = teacher.ids.shape[-1]
    ids = rows_of(teacher.ids.long(), k)
    log_probs = rows_of(teacher.log_probs.detach().to(weights.dtype), k)
    present = present_entries(ids, log_probs, None if teacher.valid is None else rows_of(teacher.valid, k))
    present = present & ~unused.unsqueeze(1)
    ids = ids.masked_fill(~present, 0)
    log_probs = log_probs.masked_fill(~present, -torch.inf)
    token_log_probs = numbers(teacher.token_log_probs)
    for name, given_log_probs in (("log_probs", log_probs), ("token_log_probs", token_log_probs)):
        if given_log_probs is not None:
            check_log_probs(f"TopKTeacher.{name}", given_log_probs)
    if token_log_probs is None and token_ids is not None:
        token_log_probs = log_prob_of(token_ids, ids, log_probs, present)
    entropy = numbers(teacher.entropy)
    if entropy is None:
        entropy = entropy_lower_bound(log_probs, present)
    return Tokens(
        token_ids,
        **tokens,
        top_ids=ids,
        top_log_probs=log_probs,
        top_present=present,
        teacher_entropy=entropy,
        teacher_token_log_probs=token_log_probs,
    )


def check_vocabulary(tokens: Tokens, objective: Objective, vocab_size: int) -> None:
    """Refuses entries, and a number of entries, that a vocabulary of this size does not have."""
    largest = max([0, *objective.top_k.values()])  # no default=, which torch.compile does not know
    if tokens.top_ids is None and largest > vocab_size:
        raise ValueError(f"TopK.k must be at most the vocabulary's {vocab_size} entries, got {largest}")
    token_ids = "token_ids" if objective.cross_entropy == 0 else "token_ids, or labels in their place,"
    for name, ids in ((token_ids, tokens.token_ids), ("TopKTeacher.ids", tokens.top_ids)):
        if ids is not None:
            within_vocabulary(name, ids, vocab_size)


def within_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """Refuses entries outside the vocabulary: with a ValueError on a CPU, else with the device's own assertion."""
    if torch.compiler.is_compiling() or ids.numel() == 0:  # compiled.py asks when there are numbers to look at
        return
    if not tensors.readable(ids):
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all())
        return
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        wrong = int(high if high >= vocab_size else low)
        raise ValueError(f"{name} must be in [0, {vocab_size}) where they count, got {wrong}")


def check_log_probs(name: str, log_probs: Tensor) -> None:
    """Refuses log-probabilities above 0, on a CPU; elsewhere looking would wait for the device, and they are taken."""
    if log_probs.numel() > 0 and tensors.readable(log_probs) and (log_probs > ROUNDED_LOG_PROB).any():
        raise ValueError(f"{name} must be at most 0 where they count, got {described(log_probs)} with larger ones")
