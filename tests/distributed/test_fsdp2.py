"""What FSDP2 leaves of a head after forward, by how it was wrapped, and that the loss is right with either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from eopd_kernels import LMHead, entropy_aware_kl
from tests.conftest import relative_error
from tests.distributed.processes import run_ranks
from tests.distributed.traffic import Traffic
from tests.distributed.training import Batch, Student

# The differences between the versions tried (2.11, 2.13, 2.14 and 2.15): what becomes of tied parameters in two groups,
# and whether a parameter that was cast asks for its gradient in the dtype that it had before.
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
REFUSES_TIED_PARAMETERS_APART = VERSION >= (2, 13)
ASKS_FOR_WIDE_GRADIENTS = VERSION >= (2, 15)
POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False),
}
# How a model is wrapped, and whether its head is whole after forward.
WRAPPED = {"root": True, "root, resharded": False, "one group": False, "one group, whole": True, "apart": False}
PARTS = (slice(0, 4), slice(4, 8))  # sequences of each rank


class Model(Student):
    """As a causal language model with ``logits_to_keep=1``: all hidden states, and the last logits."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        self.lm_head(hidden[:, -1:])
        return hidden


def wrapped(model: Any, how: str, policy: MixedPrecisionPolicy) -> Any:
    options: dict[str, Any] = {"mp_policy": policy}
    fully_shard(model.layer, **options)
    if how == "apart":
        fully_shard(model.embed, **options)
        fully_shard(model.lm_head, **options)
    elif how.startswith("one group"):
        fully_shard([model.embed, model.lm_head], **options, reshard_after_forward=not how.endswith("whole"))
    return fully_shard(model, **options, reshard_after_forward=True if how == "root, resharded" else None)


def loss_of(hidden: Tensor, weight: Tensor, part: slice, num_items: Any = 12.0) -> Tensor:
    batch = Batch()
    return entropy_aware_kl(
        hidden,
        batch.teacher[part],
        student_head=LMHead(weight),
        teacher_head=LMHead(batch.teacher_weight),
        mask=batch.mask[part],
        num_items=num_items,
    ).loss


def expected(tied: bool, policy: str, head: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """Of one process: the loss of each part, and the mean of their gradients, with parameters rounded as FSDP2 rounds
    them, but the loss's own head in ``head``."""
    losses, mean = [], {name: torch.zeros_like(p) for name, p in Model(tied).named_parameters()}
    for part in PARTS:
        model = Model(tied)
        own = model.lm_head.weight.detach().clone().to(head).requires_grad_()  # a leaf of its own
        if policy == "mixed":
            model.bfloat16()
        for leaf in (own, *model.parameters()):
            leaf.grad_dtype = torch.float32 if ASKS_FOR_WIDE_GRADIENTS else leaf.dtype
        loss = loss_of(model(Batch().ids[part]), own, part)
        loss.backward()
        losses.append(loss.item())
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        assert own.grad is not None
        if tied:
            gradients["embed.weight"] += own.grad
            if head == torch.bfloat16 and not ASKS_FOR_WIDE_GRADIENTS:
                gradients["embed.weight"] = gradients["embed.weight"].bfloat16().float()
        else:
            gradients["lm_head.weight"] = own.grad.float()
        for name, gradient in gradients.items():
            mean[name] += gradient / len(PARTS)
    return losses, mean


def outside_of_forward(how: str, tied: bool, policy: str) -> dict[str, Any]:
    """A step whose loss is called after the wrapped model's forward."""
    part = PARTS[dist.get_rank()]
    model = wrapped(Model(tied), how, POLICIES[policy])
    hidden = model(Batch().ids[part])
    weight = model.lm_head.weight
    with Traffic() as traffic:
        loss = loss_of(hidden, weight, part)
    loss.backward()
    return {
        "weight": (type(weight).__name__, weight.dtype),
        "hidden": hidden.dtype,
        "sent": {name: n for name, n in traffic.calls.items() if name != "_wrap_tensor_autograd"},
        "loss": loss.item(),
        "gradients": {name: p.grad.full_tensor() for name, p in model.named_parameters()},
    }


class WithLoss(Model):
    def forward(self, ids: Tensor, part: slice, num_items: Tensor) -> Tensor:  # type: ignore[override]
        return loss_of(super().forward(ids), self.lm_head.weight, part, num_items)


def inside_of_forward(policy: MixedPrecisionPolicy, num_items: float) -> float:
    """The loss, called in the wrapped module's forward."""
    part = PARTS[dist.get_rank()]
    model: Any = fully_shard(WithLoss(), mp_policy=policy)
    return model(Batch().ids[part], part, torch.tensor(num_items, dtype=torch.float64)).item()


def tied_apart() -> str:
    """What is said of tied parameters in two groups, or what became of them."""
    model = Model(tied=True)
    try:
        wrapped(model, "apart", POLICIES["fp32"])(Batch().ids)
    except ValueError as error:
        return str(error)
    return "tied" if model.lm_head.weight is model.embed.weight else "no longer tied"


CASES = [
    (how, tied, policy)
    for how in WRAPPED
    for tied in (False, True)
    for policy in POLICIES
    if (how, tied) != ("apart", True)
]


def two_ranks() -> dict[Any, Any]:
    casting = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        **{case: outside_of_forward(*case) for case in CASES},
        "inside": inside_of_forward(POLICIES["mixed"], 1001.0),
        "inside, inputs cast": inside_of_forward(casting, 1001.0),
        "tied, apart": tied_apart(),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[Any, Any]]:
    return run_ranks(2, two_ranks)


@pytest.mark.parametrize(("how", "tied", "policy"), CASES)
def test_the_head_after_forward(how: str, tied: bool, policy: str, found: list[dict[Any, Any]]) -> None:
    """Whole in the policy's dtype, or a DTensor in fp32 that the loss gathers once; and the numbers are those of it."""
    whole, low = WRAPPED[how], policy == "mixed"
    dtype = torch.bfloat16 if low and whole else torch.float32
    losses, gradients = expected(tied, policy, dtype)
    if low:
        other, _ = expected(tied, policy, torch.float32 if whole else torch.bfloat16)
        assert max(abs(a / b - 1) for a, b in zip(losses, other, strict=True)) > 1e-5  # the dtypes can be told apart
    for rank, of_rank in enumerate(found):
        step = of_rank[how, tied, policy]
        assert step["weight"] == ("Parameter" if whole else "DTensor", dtype)
        assert step["hidden"] == (torch.bfloat16 if low else torch.float32)
        assert step["sent"] == ({} if whole else {"all_gather_into_tensor": 1})
        assert step["loss"] == pytest.approx(losses[rank], rel=1e-6)
        assert step["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert step["gradients"][name].dtype == torch.float32
            assert relative_error(step["gradients"][name], gradient) < 1e-5, name


def test_inside_of_forward_the_weight_is_the_policys(found: list[dict[Any, Any]]) -> None:
    """In bf16; with ``cast_forward_inputs`` a count of 1,001 arrives as 1,000."""
    losses, _ = expected(False, "mixed", torch.bfloat16)
    for rank, of_rank in enumerate(found):
        assert of_rank["inside"] == pytest.approx(losses[rank] * 12 / 1001, rel=1e-6)
        assert of_rank["inside, inputs cast"] == pytest.approx(losses[rank] * 12 / 1000, rel=1e-6)


def test_tied_parameters_belong_into_one_group(found: list[dict[Any, Any]]) -> None:
    for of_rank in found:
        if REFUSES_TIED_PARAMETERS_APART:
            assert "is shared with a parameter already managed by another FSDP group" in of_rank["tied, apart"]
        else:
            assert of_rank["tied, apart"] == "no longer tied"
