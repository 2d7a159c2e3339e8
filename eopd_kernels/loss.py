"""entropy_aware_kl and EntropyAwareKLLoss: the loss with everything that was seen on each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn

from .arguments import described
from .function import EntropyAwareKL
from .inputs.check import checked
from .inputs.keywords import ALL, MODULE, TENSORS, Keywords, ModuleKeywords, TensorKeywords, shown_with, with_defaults
from .inputs.top_k_teacher import TopKTeacher
from .objective.objective import Objective
from .tensors import widest_dtype

# What is worth logging, in the order of EntropyAwareKLOutput.sums.
FIGURES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate")
TOKEN_FIGURES = ("student_log_probs", "teacher_log_probs")


class TokenFigures(Protocol):
    """What a pass leaves of the N tokens of a call, ``[N]`` each."""

    @property
    def teacher_entropy(self) -> Tensor: ...
    @property
    def student_entropy(self) -> Tensor: ...
    @property
    def forward_kl(self) -> Tensor: ...
    @property
    def reverse_kl(self) -> Tensor: ...

    @property
    def reverse(self) -> Tensor: ...
    @property
    def forward(self) -> Tensor: ...

    gate: Tensor
    token_log_probs: Tensor | None  # [N, 2]


@dataclass(frozen=True, eq=False, repr=False)
class EntropyAwareKLOutput:
    """The loss, and what was seen on each token: leading shape, fp32 (fp64 if an input is), detached, 0 where masked.

    A figure is computed when it is read, from eight numbers per token that the loss is made of anyway.

    Args:
        loss: in nats; 0-d, or of the leading shape with ``reduction="none"``. The one tensor with a gradient.
        teacher_entropy_is_lower_bound: whether a :class:`TopKTeacher` came without its entropy.

    The entropies and both full KLs are there whatever the objective is, as far as they were seen: NaN for the KLs of a
    :class:`TopKTeacher`, and for what concerns the student of a token that was left out because its gate was shut and
    there was no reverse half; what concerns the teacher too where that gate was given (``gate=``). So are the
    log-probabilities of the sampled token, which cost a gather in the visit that there is anyway.
    """

    loss: Tensor
    teacher_entropy_is_lower_bound: bool
    _seen: TokenFigures
    _valid: Tensor | None  # [N] bool, or None where all tokens count; not the mask, which may be a caller's buffer
    _leading: torch.Size

    @property
    def teacher_entropy(self) -> Tensor:
        """H_t = −Σ q log q, nats."""
        return self._figure(self._seen.teacher_entropy)

    @property
    def student_entropy(self) -> Tensor:
        """H_s = −Σ p log p, nats."""
        return self._figure(self._seen.student_entropy)

    @property
    def forward_kl(self) -> Tensor:
        """F = Σ q (log q − log p), nats, whether or not the gate is open."""
        return self._figure(self._seen.forward_kl)

    @property
    def reverse_kl(self) -> Tensor:
        """R = Σ p (log p − log q), nats."""
        return self._figure(self._seen.reverse_kl)

    @property
    def gate(self) -> Tensor:
        """How far it was open: 1 or 0, or between with a soft gate.

        ``gate.mean()`` is no share of open gates where tokens are masked, because these are 0 in it:
        ``gate[valid].mean()`` is, and so is ``means()["gate"]``.
        """
        return self._figure(self._seen.gate)

    @property
    def reverse_half(self) -> Tensor:
        """R of the objective, nats; 0 where it had no weight."""
        return self._figure(self._seen.reverse)

    @property
    def forward_half(self) -> Tensor:
        """F of the objective, nats; 0 where it had no weight."""
        return self._figure(self._seen.forward)

    @property
    def valid(self) -> Tensor:
        """Which tokens count: their weight is not 0; bool."""
        if self._valid is None:
            return torch.ones(self._leading, dtype=torch.bool, device=self.loss.device)
        return self._valid.view(self._leading)

    @property
    def student_log_probs(self) -> Tensor | None:
        """log p(y) of the sampled token, nats; None without ``token_ids=``."""
        token = self._seen.token_log_probs
        return None if token is None else self._figure(token[:, 0])

    @property
    def teacher_log_probs(self) -> Tensor | None:
        """log q(y), nats; of a :class:`TopKTeacher` its ``token_log_probs``, else what its entries say, NaN where y is
        none of them. None without ``token_ids=``."""
        token = self._seen.token_log_probs
        return None if token is None else self._figure(token[:, 1])

    def _figure(self, of_tokens: Tensor) -> Tensor:
        return (of_tokens if self._valid is None else of_tokens.where(self._valid, 0.0)).view(self._leading)

    def __repr__(self) -> str:
        return f"EntropyAwareKLOutput(loss={self.loss!r}, tokens={tuple(self._leading)})"

    def means(self) -> dict[str, Tensor]:
        """The figures' means over the valid tokens of this call, for a logger; no device is waited for.

        Returns:
            0-d fp64 tensors by the names of the fields: ``teacher_entropy``, ``student_entropy``, ``forward_kl``,
            ``reverse_kl``, ``gate``, and with ``token_ids=`` ``student_log_probs`` and ``teacher_log_probs``. Each is
            the mean over those valid tokens of which the figure is known, whatever their weights are; NaN where there
            is none, as the KLs of a :class:`TopKTeacher`.

        Example::

            out = entropy_aware_kl(torch.zeros(2, 8), torch.randn(2, 8))
            print({name: float(mean) for name, mean in out.means().items()})
        """
        return self.means_of(self.sums())

    def sums(self) -> Tensor:
        """What :meth:`means` are made of, to be added up over micro-batches and ranks before it is divided.

        Returns:
            ``[2, 5]`` fp64, with ``token_ids=`` ``[2, 7]``: of each figure the sum over the valid tokens of which it is
            known, and their number. (fp32 on a device without fp64.)

        Example::

            outs = [entropy_aware_kl(torch.zeros(n, 8), torch.randn(n, 8)) for n in (2, 7)]
            sums = torch.stack([out.sums() for out in outs]).sum(0)
            # torch.distributed.all_reduce(sums), over the ranks that have other tokens
            means = EntropyAwareKLOutput.means_of(sums)
        """
        names = FIGURES if self.student_log_probs is None else FIGURES + TOKEN_FIGURES
        figures = torch.stack([getattr(self, name).reshape(-1) for name in names])  # [k, N]
        figures = figures.to(widest_dtype(figures.device))
        known = self.valid.reshape(1, -1) & ~figures.isnan()
        return torch.stack([figures.where(known, 0.0).sum(1), known.sum(1, dtype=figures.dtype)])

    @staticmethod
    def means_of(sums: Tensor) -> dict[str, Tensor]:
        """The means behind :meth:`sums`, of one call or added up over several.

        Raises:
            ValueError: ``sums`` has another shape.
        """
        names = FIGURES + TOKEN_FIGURES
        if tuple(sums.shape) not in ((2, len(FIGURES)), (2, len(names))):
            raise ValueError(f"sums must be [2, 5] or [2, 7] as EntropyAwareKLOutput.sums gives, got {described(sums)}")
        total, count = sums
        return dict(zip(names, (total / count).unbind(), strict=False))


@shown_with(ALL)
def entropy_aware_kl(
    student: Tensor, teacher: Tensor | TopKTeacher | None, **keywords: Unpack[Keywords]
) -> EntropyAwareKLOutput:
    """The entropy-aware distillation loss L = reverse_kl + α·1[H_teacher > τ]·forward_kl (arXiv 2603.07079, Eq. 9).

    Each side is logits or, with a head, hidden states; then its logits exist only a block at a time, in fp32 whatever
    the inputs. Positions of student and teacher correspond; nothing is shifted here. Under torch.autocast a GPU's
    products take their operands in autocast's dtype and give fp32; on a CPU it changes nothing.

    Args:
        student: ``[..., V]`` logits or ``[..., D_s]`` hidden states; fp32, bf16, fp16 or fp64, any strides.
        teacher: ``[..., V]`` logits or ``[..., D_t]`` hidden states with the same leading shape; must not require
            grad. Or a :class:`TopKTeacher`, for a sampled or top-k reverse half and a top-k forward half. Or None, for
            a sampled reverse half alone with ``advantages``: what concerns the teacher is NaN then.
        student_head: the student's :class:`LMHead`, or None (default) if ``student`` is logits.
        teacher_head: the teacher's, likewise; its tensors must not require grad.
        mask: leading shape, bool or number: the weight of each token, 0 for tokens that are left out. Default: all 1.
            Like ``labels`` and all else that is said of each token, it speaks of the position that predicts: a batch's
            own mask is one position late; see :func:`shifted`. A CPU refuses negative, infinite and NaN weights where
            they count, such as those of an additive attention mask (0 and −inf); elsewhere they are not looked at, and
            give a loss of NaN or of the wrong sign.
        labels: leading shape, any integer dtype: tokens equal to ``ignore_index`` are left out. May be combined with
            ``mask``. The ``labels`` of a Hugging Face batch are not shifted: pass ``**shifted(labels=labels)``. With an
            objective's ``cross_entropy`` they are the ``token_ids`` where these are not given.
        ignore_index: default −100, as in torch's cross-entropy.
        num_items: replaces the count of ``reduction="mean"``: a number or 0-d tensor, finite and at least 0, e.g. the
            tokens of all the micro-batches of an optimizer step (``num_items_in_batch`` of transformers); 0 divides by
            1. A tensor may lie on the CPU beside logits on a GPU. Default: the valid tokens here, i.e. all whose weight
            is not 0, whether or not their gate is open.
        vocab_size: compare the first so many entries only; required where the two vocabularies differ in size.
        objective: see :class:`Objective`. Default ``Objective()``: τ = 0.8 nats, α = 1, T = 1.
        token_ids: leading shape, integer: the sampled token y at each position, which is the token that follows it:
            then there are ``student_log_probs`` and ``teacher_log_probs``, under every objective. A sampled reverse
            half needs it; a ``cross_entropy`` is that of y.
        old_log_probs: leading shape: log p_old(y) in nats under the policy that sampled it, at the student's
            temperature. A CPU refuses those above 0 by more than rounding (0.125); elsewhere they are taken.
        advantages: leading shape: A of a sampled reverse half, in place of log q(y) − log p_old(y).
        gate: leading shape: how far each token's gate is open, in place of the objective's gate. No gradient.
        reverse_weights: leading shape: a factor of the reverse half of each token. It changes no denominator.
        forward_weights: likewise of the forward half.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"`` (the weighted loss of each token).
        schedule: ``"chunked"`` takes the gradient in forward, while a chunk's logits are alive: the fewest flops.
            ``"recompute"`` projects slices of the vocabulary again in backward: the least memory, and any upstream
            gradient. ``"auto"`` (default): chunked, and recompute for ``reduction="none"`` and for gates that need
            every token's statistics first (a :class:`QuantileGate`, a callable).
        backend: ``"auto"`` (default), ``"cpu"`` (native kernels), ``"cuda"`` (NVIDIA GPUs), ``"triton"`` (GPUs) or
            ``"torch"``; see ``python -m eopd_kernels.info``. The environment variable ``EOPD_BACKEND`` takes the place
            of "auto".
        inplace: with a student that is logits, put the gradient into the logits' own memory (default False): nothing
            of N × V is allocated, and their values are gone after forward. Rows must lie apart, from each other and
            from the teacher's. If something else needs them for its backward, autograd says so. Without effect where no
            gradient is taken.
        workspace_bytes: budget for the blocks of logits of both sides and of their gradient. Default: 128 MiB on a CPU
            or what 128 tokens of the whole vocabulary need, on a GPU 3 GiB or what 1,024 tokens need. A budget of one's
            own is kept to down to 32 tokens (of 512 entries under "recompute"), below which the products
            would cost a multiple.
        gradient_filter: ε in (0, 1]: with a student_head, leave out of the products behind its gradients the entries of
            the vocabulary whose gradient is smaller than ε in a whole block of tokens, for a token of the largest
            weight; the hidden states lose those below ε/4 only, and get an estimate of them. The loss stays exact.
            Default None: exact gradients. 2^-12 changes them by less than 1 % on the states of docs/math.md, the more
            the smaller the loss is. On a GPU each block waits for the numbers of such entries.
        wait_free: never wait for the device (default False). With hidden states and a ``mask`` or ``labels`` a call
            otherwise asks a GPU once how many tokens count, and leaves the masked ones out of all products; wait-free
            they cost as much as the others. So it is, whatever is said here, while a CUDA graph is captured. Without
            effect on a CPU. Not to be had with a ``gradient_filter``.
        tensor_parallel_group: the ranks over which both vocabularies are spread, a ``ProcessGroup`` or a ``DeviceMesh``
            of one dimension; default None: all of them is here. Each rank passes its shard of consecutive entries of
            either side, in rank order: logits ``[..., V_r]`` or a head with a weight ``[V_r, D]`` and its part of the
            bias (V_r may differ from rank to rank and be 0), or logits or a head that are DTensors, sharded on the
            vocabulary over this group; their gradients are DTensors again. A DTensor is taken for a shard of the
            vocabulary only where this group is given. Pass ``vocab_size`` (which may leave out a padded end): then
            ranks that hold the whole vocabulary each are refused, not taken for R shards. Everything else is the same
            on every rank, ``token_ids`` and ``vocab_size`` are those of the whole vocabulary, and so are loss and
            figures, bit for bit. Gradients of logits, weight and bias are the shard's; the upstream gradient must be
            the same on every rank, and every rank must run backward. docs/distributed.md has a picture.
        partial_hidden_gradient: with a ``tensor_parallel_group``, leave the gradient of the hidden states as this
            rank's part of their sum, for the reduce-scatter of sequence parallelism. Default False: it is summed over
            the ranks here.

    Returns:
        The loss and the per-token figures. Nothing valid gives a loss of 0 that is attached to the graph.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it, and says what came and
            what is allowed. Shards that do not fit together, other options or tokens on some rank of a
            ``tensor_parallel_group``, and a call that one of them refuses, are errors on every rank.

    Note:
        A column where both sides are −inf contributes nothing. Where only the teacher is −inf, reverse_kl is +inf as
        the definition says; where only the student is, forward_kl is. A NaN in a row makes that row's figures NaN, its
        gate included. There are first derivatives, of the student and its head only: nothing else may require grad, and
        whoever asks for a second one, for many gradients at once or for forward mode is told.

    Example::

        hidden = torch.randn(2, 5, 8, requires_grad=True)  # [B, T, D]
        head = LMHead(torch.randn(100, 8, requires_grad=True))
        teacher = torch.randn(2, 5, 100)  # logits, which either side may be
        out = entropy_aware_kl(hidden, teacher, student_head=head, mask=torch.ones(2, 5))
        out.loss.backward()
        assert hidden.grad.shape == hidden.shape and head.weight.grad.shape == (100, 8)
        assert out.gate.shape == out.teacher_entropy.shape == (2, 5)
    """
    call = checked(student, teacher, with_defaults("entropy_aware_kl", keywords))
    loss, seen = EntropyAwareKL.of(call)
    lower_bound = isinstance(teacher, TopKTeacher) and teacher.entropy is None
    valid = call.weights != 0 if call.options.some_weigh_nothing else None
    return EntropyAwareKLOutput(loss, lower_bound, seen, valid, call.leading)


class EntropyAwareKLLoss(nn.Module):
    """:func:`entropy_aware_kl` with its options remembered, each as an attribute of its name.

    Args:
        objective: as there.
        **keywords: ``reduction``, ``ignore_index``, ``vocab_size``, ``schedule``, ``backend``, ``inplace``,
            ``workspace_bytes``, ``gradient_filter``, ``wait_free``, ``tensor_parallel_group`` and
            ``partial_hidden_gradient``, as there.

    Example::

        criterion = EntropyAwareKLLoss(Objective(alpha=0.5), reduction="sum")
        loss = criterion(torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)).loss
        loss.backward()

    ``forward`` takes the rest: ``student, teacher, *, student_head, teacher_head, mask, labels, num_items, token_ids,
    old_log_probs, advantages, gate, reverse_weights, forward_weights``; it returns an :class:`EntropyAwareKLOutput`.
    """

    @shown_with(MODULE)
    def __init__(self, objective: Objective | None = None, **keywords: Unpack[ModuleKeywords]) -> None:
        super().__init__()
        given = with_defaults("EntropyAwareKLLoss", keywords, MODULE)
        self.objective = Objective() if objective is None else objective
        for name in MODULE:
            setattr(self, name, given[name])  # type: ignore[literal-required]

    @shown_with(TENSORS)
    def forward(
        self, student: Tensor, teacher: Tensor | TopKTeacher | None, **keywords: Unpack[TensorKeywords]
    ) -> EntropyAwareKLOutput:
        given: Any = with_defaults("EntropyAwareKLLoss.forward", keywords, TENSORS)
        given.update({name: getattr(self, name) for name in ("objective", *MODULE)})
        return entropy_aware_kl(student, teacher, **given)

    def extra_repr(self) -> str:
        return f"{self.objective!r}, reduction={self.reduction!r}, schedule={self.schedule!r}, backend={self.backend!r}"
