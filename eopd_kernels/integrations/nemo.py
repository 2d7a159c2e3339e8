"""NeMo AutoModel: a ``kd_loss_fn`` for its recipe of knowledge distillation, named in the recipe's YAML."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import Objective, entropy_aware_kl
from ..distributed.data_parallel import is_dtensor
from .batches import check_how, check_objective
from .figures import Figures
from .hooks import check_parameters, find

TESTED = "0.7.0"
MODULE = "nemo_automodel.components.loss.kd_loss"
FORWARD = ("student_logits", "teacher_logits", "labels", "num_batch_labels")


class KDLoss(nn.Module):
    """The loss in the place of NeMo AutoModel's own ``KDLoss``, with any objective.

    Args:
        ignore_index: labels of tokens that are left out. Default −100.
        temperature: T > 0 of both sides; the loss is multiplied by T², as NeMo's. Default 1.0.
        fp32_upcast, chunk_size: taken and without effect: logits are read a row at a time, in fp32.
        tp_group: the ranks over which both vocabularies are spread. Default None: those of a DTensor that is sharded on
            its vocabulary, else all of it is here.
        objective: an :class:`Objective` in place of the forward KL and of ``temperature``, which must then be 1.0; the
            attribute ``temperature``, which the recipe logs, is the student's. No T² then, unless the objective says
            ``temperature_squared``.
        vocab_size: as in :func:`entropy_aware_kl`, for vocabularies of two sizes.
        **how: schedule, backend, workspace_bytes, gradient_filter, wait_free: likewise.

    Attributes:
        figures: what the loss saw, added up: ``figures.means(training)`` gives the means since it was last asked, and
            ``figures.last_output`` the last call's output.

    Raises:
        HookMoved: NeMo AutoModel is not as this was written for (0.7.0); the message says what has moved.
        TypeError, ValueError: an argument is outside what is stated above; the objective has a sampled reverse half,
            for which the recipe has no old log-probabilities.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
        objective: Objective | None = None,
        vocab_size: int | None = None,
        **how: Any,
    ) -> None:
        super().__init__()
        theirs = find("nemo-automodel", TESTED, MODULE, "KDLoss.forward")
        check_parameters("nemo-automodel", TESTED, f"{MODULE}.KDLoss.forward", theirs, FORWARD)
        if objective is None:
            objective = Objective(gate="always", reverse="none", temperature=temperature, temperature_squared=True)
        elif temperature != 1:
            raise ValueError(f"objective replaces temperature, got both: {objective!r}, temperature={temperature!r}")
        check_objective(objective)
        self.objective, self.temperature = objective, objective.temperatures[0]
        self.ignore_index, self.tp_group, self.vocab_size = ignore_index, tp_group, vocab_size
        self.how = check_how("KDLoss", how)
        self.figures = Figures()

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_batch_labels: int | None = None
    ) -> Tensor:
        """The sum over the tokens whose label is not ``ignore_index``, by ``num_batch_labels`` or else their number.

        Args:
            student_logits: ``[..., V]``; a DTensor that is sharded on V stays where it is, any other is gathered.
            teacher_logits: likewise; no gradient flows into the teacher.
            labels: integer, one for each row of logits, aligned with them: nothing is shifted here.
            num_batch_labels: the tokens of the optimizer step. Default None: those of this call.

        Raises:
            TypeError, ValueError: as :func:`eopd_kernels.entropy_aware_kl`.
        """
        group = self.tp_group
        if group is None and (dim := vocabulary_dim(student_logits)) is not None:
            group = student_logits.device_mesh.get_group(dim)  # type: ignore[attr-defined]
        student, teacher = (here(logits, group is not None) for logits in (student_logits, teacher_logits.detach()))
        out = entropy_aware_kl(
            student,
            teacher,
            labels=here(labels, False).reshape(student.shape[:-1]),
            ignore_index=self.ignore_index,
            num_items=num_batch_labels,
            vocab_size=self.vocab_size,
            objective=self.objective,
            tensor_parallel_group=group,
            **self.how,
        )
        self.figures.add(out, training=out.loss.requires_grad)
        return out.loss


def vocabulary_dim(logits: Any) -> int | None:
    """Over which dimension of its mesh a DTensor's last dimension is sharded; None where it is not, or for a tensor."""
    placements = logits.placements if is_dtensor(logits) else ()
    found = [dim for dim, placement in enumerate(placements) if placement.is_shard(logits.ndim - 1)]
    return found[0] if found else None


def here(tensor: Any, shard: bool) -> Tensor:
    """A DTensor as this rank's shard of it, or gathered; a tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    return tensor.to_local() if shard else tensor.full_tensor()
