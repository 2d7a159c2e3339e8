"""Where a rounding to 16 bits, or a difference of large numbers, took the result away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from tests.reports.plain import close, gradient, normal, plain, solved


def generalised_jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """β = 1/2, of each token."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return ((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2).sum(-1)


def test_logits_are_not_rounded_before_they_are_fp32() -> None:
    """linkedin/Liger-Kernel#1432: bf16 products cast to fp32 afterwards, gradients off by 4 to 23 %."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 256, generator=generator).bfloat16()
    weight = torch.randn(800, 256, generator=generator).bfloat16()
    near = (hidden.float() + 0.01 * torch.randn(16, 256, generator=generator)).bfloat16()

    def jsd(rounded: bool) -> Tensor:
        leaf = hidden.double().requires_grad_()
        logits = [x @ weight.double().t() for x in (leaf, near.double())]
        if rounded:
            logits = [z + (z.detach().bfloat16().double() - z.detach()) for z in logits]
        return gradient(generalised_jsd(*(z.log_softmax(-1) for z in logits)).mean(), leaf)

    leaf = hidden.clone().requires_grad_()
    heads: dict[str, Any] = {"student_head": LMHead(weight), "teacher_head": LMHead(weight)}
    loss = entropy_aware_kl(leaf, near, objective=Objective.jsd(0.5), **heads).loss
    ours, truth = gradient(loss, leaf), jsd(False)
    close(ours, truth, 2**-8)
    assert (jsd(True) - truth).norm() > 0.04 * truth.norm()  # the report's own figure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_heads_gradient_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """linkedin/Liger-Kernel#512: a head in fp16, and the loss diverged at 8; #1322 gave its JSD an accumulator of its
    own; fla-org/flash-linear-attention#874 did likewise."""
    hidden, teacher = (normal(512, 8, seed=1) + 1).to(dtype), normal(512, 40, seed=2)
    weight = normal(40, 8, seed=3, scale=0.5).to(dtype)
    head = LMHead(weight.clone().requires_grad_())
    options: dict[str, Any] = {"objective": Objective.forward_kl(), "student_head": head, "reduction": "sum"}
    loss = entropy_aware_kl(hidden, teacher, workspace_bytes=1, **options).loss
    exact = weight.double().requires_grad_()
    truth = gradient(plain(hidden.double() @ exact.t(), teacher).forward_kl.sum(), exact)
    close(gradient(loss, head.weight), truth, {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype])
    in_parts = torch.zeros(40, 8, dtype=dtype)
    for x, z in zip(hidden.split(4), teacher.split(4), strict=True):
        part = weight.double().requires_grad_()
        in_parts += gradient(plain(x.double() @ part.t(), z).forward_kl.sum(), part).to(dtype)
    assert (in_parts - truth).abs().max() > {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * truth.abs().max()


@pytest.mark.parametrize("objective", [Objective.forward_kl(), Objective.reverse_kl(), Objective.jsd(0.5)], ids=str)
def test_the_same_logits_have_no_divergence_however_wide(objective: Objective) -> None:
    """erfanzar/EasyDeL#267: bit-identical bf16 logits of 248,320 entries had a KL of 0.0248, negative on other devices:
    sums in bf16."""
    logits = normal(2, 248_320, scale=12.0).bfloat16()
    logits[:, 777] = 60.0
    out = entropy_aware_kl(logits.clone().requires_grad_(), logits, objective=objective)
    assert 0 <= out.loss < 1e-6 and torch.equal(out.forward_kl, torch.zeros(2))
    assert (out.teacher_entropy - plain(logits, logits).teacher_entropy).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_a_low_temperature_has_a_finite_gradient(name: str, dtype: torch.dtype) -> None:
    """MakazhanAlpamys/Soup#719: at T = 0.05 the probabilities underflow, and a finite loss had NaN gradients; in fp16
    its JSD was NaN as well."""
    objective = Objective.reverse_kl(0.05) if name == "reverse_kl" else Objective.jsd(0.5, 0.05)
    student, teacher = normal(3, 40, seed=1, scale=0.1), normal(3, 40, seed=2, scale=0.1)
    student[:, ::3] -= 8
    teacher[:, 1::3] -= 8
    if name == "reverse_kl":
        teacher[:, 1::3] += 7  # it would be 160 nats there, and every gradient a difference of such numbers
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, ours = solved(student, teacher, objective=objective)
    leaf = student.double().requires_grad_()
    if name == "reverse_kl":
        truth = plain(leaf, teacher, 0.05).reverse_kl.mean()
    else:
        truth = generalised_jsd(*((z / 0.05).log_softmax(-1) for z in (leaf, teacher.double()))).mean()
    close(loss, truth)
    close(ours, gradient(truth, leaf), {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype])


def test_a_sum_beyond_fp16() -> None:
    """linkedin/Liger-Kernel#300: the sum of all tokens' losses was taken before the division, and may overflow."""
    student, teacher = normal(400, 60, seed=1, scale=200.0).half(), normal(400, 60, seed=2, scale=200.0).half()
    truth = plain(student, teacher).reverse_kl.sum()
    assert truth > torch.finfo(torch.float16).max
    close(solved(student, teacher, objective=Objective.reverse_kl(), reduction="sum")[0], truth)


@pytest.mark.parametrize(("of_hidden", "of_weight"), [("bfloat16", "float32"), ("float32", "float16")])
def test_hidden_states_and_head_of_two_dtypes(of_hidden: str, of_weight: str) -> None:
    """linkedin/Liger-Kernel#305, hiyouga/LlamaFactory#5583: "mat1 and mat2 must have the same dtype"."""
    hidden, weight = normal(9, 8).to(getattr(torch, of_hidden)), normal(31, 8, seed=1).to(getattr(torch, of_weight))
    teacher = normal(9, 31, seed=2)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = entropy_aware_kl(leaves[0], teacher, student_head=LMHead(leaves[1]), objective=Objective.reverse_kl()).loss
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    truth = plain(exact[0] @ exact[1].t(), teacher).reverse_kl.mean()
    close(loss, truth)
    for ours, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True):
        assert ours.dtype in (torch.float32, hidden.dtype, weight.dtype)
        close(ours, expected, 2**-8)


@pytest.mark.parametrize("steps", [60])
def test_a_bf16_head_still_converges(steps: int) -> None:
    """NVIDIA/Megatron-LM#2739: with logits rounded to bf16 distillation did not converge."""
    teacher_hidden, teacher_weight = normal(64, 12, seed=1, scale=1.0), normal(50, 12, seed=2, scale=1.0)
    master = normal(50, 12, seed=3, scale=0.1).requires_grad_()
    optimizer = torch.optim.Adam([master], lr=0.1)
    losses = []
    for _ in range(steps):
        out = entropy_aware_kl(
            teacher_hidden.bfloat16(),
            teacher_hidden,
            student_head=LMHead(master.bfloat16()),
            teacher_head=LMHead(teacher_weight),
            objective=Objective.reverse_kl(),
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
