"""What a head does to its logits, and who gets which gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from tests.reports.plain import close, normal, plain

JEFFREYS = Objective.jeffreys()


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a weight and a bias that require grad, teacher logits."""
    leaves = (normal(7, 8, seed=1), normal(31, 8, seed=2), normal(31, seed=3))
    return *(leaf.requires_grad_() for leaf in leaves), normal(7, 31, seed=4)  # type: ignore[return-value]


def check(options: dict[str, Any], transform: Any) -> None:
    """Loss and all three gradients of a head with these options."""
    hidden, weight, bias, teacher = problem()
    loss = entropy_aware_kl(hidden, teacher, student_head=LMHead(weight, bias, **options), objective=JEFFREYS).loss
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    kls = plain(transform(exact[0] @ exact[1].t() + exact[2]), teacher)
    truth = (kls.forward_kl + kls.reverse_kl).mean()
    close(loss, truth)
    ours, theirs = torch.autograd.grad(1.7 * loss, (hidden, weight, bias)), torch.autograd.grad(1.7 * truth, exact)
    for value, expected in zip(ours, theirs, strict=True):
        close(value, expected, 1e-4)


@pytest.mark.parametrize("scale", [0.0625, 1 / 8.0, -2.0])
def test_the_logit_scale(scale: float) -> None:
    """unslothai/unsloth#11277: Cohere's logit_scale and Granite's logits_scaling were dropped, a loss of 7.9 for
    2.0."""
    check({"scale": scale}, lambda z: scale * z)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_the_softcap(softcap: float) -> None:
    """apple/ml-cross-entropy#48: Gemma 2's was never switched on; unslothai/unsloth-zoo#593 computed z·tanh(z/cap),
    which caps nothing."""
    check({"softcap": softcap}, lambda z: softcap * torch.tanh(z / softcap))


def test_scale_and_softcap_together() -> None:
    """huggingface/trl#6526: the chunked loss projected without either; the order is scale, then cap."""
    check({"scale": 0.3, "softcap": 5.0}, lambda z: 5.0 * torch.tanh(0.3 * z / 5.0))


@pytest.mark.parametrize(
    ("field", "value", "scale", "softcap"),
    [
        ("logit_scale", 0.0625, 0.0625, None),
        ("logits_scaling", 8.0, 0.125, None),
        ("final_logit_softcapping", 30.0, 1.0, 30.0),
    ],
)
def test_a_models_config_is_read(field: str, value: float, scale: float, softcap: float | None) -> None:
    """unslothai/unsloth#11277, apple/ml-cross-entropy#48: what a class like Cohere's, Granite's or Gemma 2's has in its
    config has to reach the loss without being passed by hand."""
    name = {"logit_scale": "Cohere", "logits_scaling": "Granite", "final_logit_softcapping": "Gemma2"}[field]
    linear = nn.Linear(8, 31, bias=False)
    config = SimpleNamespace(**{field: value}, is_encoder_decoder=False)
    members = {"config": config, "get_output_embeddings": lambda self: linear}
    model = type(f"{name}ForCausalLM", (nn.Module,), members)()
    head = LMHead.from_model(model)
    assert head.weight is linear.weight and head.scale == scale and head.softcap == softcap


def test_a_large_bias() -> None:
    """apple/ml-cross-entropy#52: with a bias losses came out lower, many of them negative."""
    hidden, weight, _, teacher = problem()
    bias = (40 * torch.arange(31).float().remainder(2) - 20).requires_grad_()
    out = entropy_aware_kl(hidden, teacher, student_head=LMHead(weight, bias), objective=JEFFREYS, reduction="none")
    exact = bias.detach().double().requires_grad_()
    kls = plain(hidden.detach().double() @ weight.detach().double().t() + exact, teacher)
    close(out.loss, kls.forward_kl + kls.reverse_kl)
    assert (out.loss > 0).all()
    of_bias = torch.autograd.grad(out.loss.sum(), bias)[0]
    close(of_bias, torch.autograd.grad((kls.forward_kl + kls.reverse_kl).sum(), exact)[0])


def test_every_token_has_an_upstream_gradient_of_its_own() -> None:
    """linkedin/Liger-Kernel#968, #1298: with reduction="none" the weight's and the bias's gradients were those of the
    first token's, 0 where it was ignored."""
    hidden, weight, bias, teacher = problem()
    factors = torch.tensor([0.0, 2.0, -1.0, 0.5, 0.0, 3.0, 1.0])
    mask = torch.tensor([False, True, True, True, True, True, True])
    out = entropy_aware_kl(
        hidden, teacher, student_head=LMHead(weight, bias), objective=JEFFREYS, mask=mask, reduction="none"
    )
    ours = torch.autograd.grad((out.loss * factors).sum(), (hidden, weight, bias))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    kls = plain(exact[0] @ exact[1].t() + exact[2], teacher)
    truth = ((kls.forward_kl + kls.reverse_kl) * factors * mask).sum()
    for value, expected in zip(ours, torch.autograd.grad(truth, exact), strict=True):
        close(value, expected)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_any_of_the_three_may_be_frozen(trained: tuple[int, ...], schedule: str) -> None:
    """linkedin/Liger-Kernel#1157: with frozen hidden states and a bias, None.detach() raised AttributeError."""
    leaves = [leaf.detach().requires_grad_(index in trained) for index, leaf in enumerate(problem()[:3])]
    teacher = problem()[3]
    loss = entropy_aware_kl(
        leaves[0], teacher, student_head=LMHead(leaves[1], leaves[2]), objective=JEFFREYS, schedule=schedule
    ).loss
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kls = plain(exact[0] @ exact[1].t() + exact[2], teacher)
    truth = torch.autograd.grad((kls.forward_kl + kls.reverse_kl).mean(), [exact[i] for i in trained])
    for value, expected in zip(torch.autograd.grad(loss, [leaves[i] for i in trained]), truth, strict=True):
        close(value, expected)


def test_a_partitioned_weight_is_no_vocabulary_of_0() -> None:
    """huggingface/trl#6859: under ZeRO-3 the kernel was handed a weight of no elements."""
    with pytest.raises(ValueError, match=r"LMHead.weight"):
        LMHead(torch.empty(0))


def test_two_losses_on_one_tensor_of_logits() -> None:
    """unslothai/unsloth#5002: the backward wrote over the logits, and a second loss on them was differentiated
    wrongly."""
    logits, teacher = normal(6, 31, seed=1).requires_grad_(), normal(6, 31, seed=2)
    labels = torch.arange(6)
    shared = logits * 1.0
    ours = entropy_aware_kl(shared, teacher, objective=JEFFREYS).loss
    theirs = nn.functional.cross_entropy(shared, labels)
    both = torch.autograd.grad(ours + theirs, logits)[0]
    exact = logits.detach().double().requires_grad_()
    kls = plain(exact, teacher)
    truth = (kls.forward_kl + kls.reverse_kl).mean() + nn.functional.cross_entropy(exact, labels)
    close(both, torch.autograd.grad(truth, exact)[0])
