"""gradient_filter=: what is left out of the products, what is estimated of it, and what stays exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eopd_kernels import EntropyAwareKLLoss, LMHead, Objective, TopK, entropy_aware_kl
from eopd_kernels.schedules.gradient_filter import PANEL_COLUMNS, significant_columns
from tests.conftest import Case, make_case, relative_error, upstream_for

TOKENS, VOCAB = 70, 2500
EPSILON = 2.0**-10
# Chunks of 32 tokens, the least there is, so that the last one is not full.
SMALL = {"workspace_bytes": 1, "schedule": "chunked"}


def peaked(dtype: torch.dtype = torch.float64, **options: Any) -> Case:
    """Rows whose mass lies on few of the entries, under heads that agree: most columns have next to no gradient."""
    case = make_case(leading=(TOKENS,), vocab_size=VOCAB, bias=True, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 24, generator=generator, dtype=torch.float64) + 0.5
    noised = hidden + 0.05 * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    head = LMHead(weight.clone().requires_grad_(), bias.requires_grad_(), scale=0.8)
    made = replace(
        case, student=noised.requires_grad_(), teacher=hidden, student_head=head, teacher_head=LMHead(weight, scale=0.8)
    )
    return made.to(dtype)


def gradients(case: Case, upstream: float = 1.0, **options: Any) -> list[Tensor]:
    loss = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, **options}).loss
    (loss * upstream).sum().backward()
    taken = [leaf.grad for leaf in case.leaves]
    for leaf in case.leaves:
        leaf.grad = None
    return taken  # type: ignore[return-value]


def expected(
    case: Case, epsilon: float, chunk: int, parts: Sequence[int] = (VOCAB,)
) -> tuple[list[Tensor], tuple[float, float]]:
    """The definition, from the gradient of the logits, and the shares of columns kept: for dW, for dX.

    ``parts``: how many columns are seen at a time, each part with an estimate of its own.
    """
    head = case.student_head
    assert head is not None
    hidden, weight = case.student.detach(), head.weight.detach()
    logits = (hidden @ weight.t() + head.bias).detach().requires_grad_()  # type: ignore[operator]
    of_teacher = case.teacher @ case.teacher_head.weight.t()  # type: ignore[union-attr]
    scaled: dict[str, Any] = {"objective": replace(case.objective, temperature=1 / head.scale), "mask": case.mask}
    entropy_aware_kl(logits, of_teacher, reduction="sum", **scaled).loss.backward()
    assert logits.grad is not None
    weights = torch.ones(TOKENS) if case.mask is None else case.mask.double()
    grad_hidden, grad_weight, shares = torch.zeros_like(hidden), torch.zeros_like(weight), [0.0, 0.0]
    rows_used = weights.nonzero().squeeze(1)
    for rows in rows_used.split(chunk):
        gradient = logits.grad[rows]
        size = gradient.abs().amax(0) / (epsilon * weights.abs().max())
        kept, for_hidden = size >= 1, size >= 1 / 4
        for i, columns in enumerate((kept, for_hidden)):
            shares[i] += float(columns.double().mean()) * len(rows) / len(rows_used)
        grad_hidden[rows] = gradient[:, for_hidden] @ weight[for_hidden]
        for part in torch.arange(VOCAB).split(list(parts)):
            left_out, between = part[~for_hidden[part]], part[(for_hidden & ~kept)[part]]
            grad_hidden[rows] += gradient[:, left_out].sum(1, keepdim=True) * weight[between].mean(0)
        grad_weight[kept] += gradient[:, kept].t() @ hidden[rows]
    return [grad_hidden, grad_weight, logits.grad.sum(0)], (shares[0], shares[1])


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_what_its_definition_says(schedule: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eopd_kernels.schedules.gradient_filter.PANEL_COLUMNS", 100)
    case = peaked()
    if masked:
        case = replace(case, mask=torch.arange(TOKENS).remainder(3).double())  # weights 0, 1 and 2
    used = TOKENS if case.mask is None else int((case.mask != 0).sum())
    chunk = used
    options: dict[str, Any] = {"schedule": schedule}
    if schedule == "chunked":
        chunk = -(-used // -(-used // 32))
        options = SMALL
    truth, kept = expected(case, EPSILON, chunk)
    assert 0.05 < kept[0] < 0.8 * kept[1] < 0.6, "the case tells nothing"
    for value, true in zip(gradients(case, reduction="sum", gradient_filter=EPSILON, **options), truth, strict=True):
        assert relative_error(value, true) < 1e-11
    exact = gradients(case, reduction="sum", **options)
    assert relative_error(truth[0], exact[0]) > 1e-6 < relative_error(truth[1], exact[1])


def test_errors_fall_with_epsilon_and_the_bias_is_exact() -> None:
    case = peaked(torch.float32)
    exact = gradients(case)
    errors = []
    for exponent in (-6, -9, -12, -60):
        filtered = gradients(case, gradient_filter=2.0**exponent)
        errors.append([float((f - e).norm() / e.norm()) for f, e in zip(filtered, exact, strict=True)])
        assert relative_error(filtered[2], exact[2]) < 1e-6
    for one, next_one in pairwise(errors):
        assert next_one[0] < 0.5 * one[0] and next_one[1] < 0.5 * one[1]
    assert errors[-1] == [0.0, 0.0, 0.0], "all columns are kept, and taken as usual"


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_epsilon_is_per_token_whatever_the_loss_is_divided_by(schedule: str) -> None:
    case = peaked(torch.float32)
    options: dict[str, Any] = {"schedule": schedule, "gradient_filter": EPSILON}
    one = gradients(case, num_items=1, **options)
    many = gradients(case, num_items=1 << 20, **options)
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b * 2**20)
    upstream = gradients(case, upstream=-0.25, num_items=1, **options)
    for a, b in zip(one, upstream, strict=True):
        assert torch.equal(a * -0.25, b)


def test_the_loss_and_what_is_seen_are_exact() -> None:
    case = peaked(torch.float32)
    exact = entropy_aware_kl(case.student, case.teacher, **case.arguments)
    filtered = EntropyAwareKLLoss(case.objective, gradient_filter=0.25)(
        case.student, case.teacher, student_head=case.student_head, teacher_head=case.teacher_head
    )
    for name in ("loss", "teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate"):
        assert torch.equal(getattr(exact, name), getattr(filtered, name)), name


def test_the_products_shrink_with_the_columns() -> None:
    def flops(**options: Any) -> int:
        in_place = {torch.ops.aten.addmm_: lambda out, a, b, *rest, **named: 2 * a[0] * a[1] * b[1]}  # unknown to torch
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            gradients(case, **options)
        return int(counter.get_total_flops())

    case = peaked(torch.float32)
    product = 2 * TOKENS * VOCAB * 24
    assert flops() == 4 * product
    kept = expected(case.to(torch.float64), EPSILON, TOKENS)[1]
    estimate = 2 * TOKENS * VOCAB  # the sum of the columns left out
    assert flops(gradient_filter=EPSILON) == pytest.approx((2 + sum(kept)) * product + estimate, rel=1e-3)


def test_upstream_gradients_per_token_and_sparse_halves() -> None:
    case = peaked(torch.float32)
    case = replace(case, objective=Objective(forward=TopK(8)))

    def taken(**options: Any) -> tuple[Tensor, ...]:
        loss = entropy_aware_kl(case.student, case.teacher, **case.arguments, reduction="none", **options).loss
        return torch.autograd.grad(loss, case.leaves, upstream_for(loss))

    exact, filtered = taken(), taken(gradient_filter=EPSILON / 4)
    for f, e in zip(filtered, exact, strict=True):
        assert float((f - e).norm() / e.norm()) < 0.05
    assert not torch.equal(filtered[1], exact[1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_is_asked_for(frozen: int) -> None:
    case = peaked(torch.float32)
    whole = gradients(case, gradient_filter=EPSILON)
    case.leaves[frozen].requires_grad_(False)
    rest = gradients(case, gradient_filter=EPSILON)
    for value, true in zip(rest, [g for i, g in enumerate(whole) if i != frozen], strict=True):
        assert torch.equal(value, true)


def test_a_low_precision_head_is_gathered_in_its_own_dtype() -> None:
    case = peaked(torch.bfloat16)
    wide = case.to(torch.float32)
    for value, true in zip(
        gradients(case, gradient_filter=EPSILON), gradients(wide, gradient_filter=EPSILON), strict=True
    ):
        assert value.dtype == torch.bfloat16 and relative_error(value.float(), true) < 5e-3


def test_rows_that_are_not_numbers_are_not_lost() -> None:
    case = peaked(torch.float32)
    with torch.no_grad():
        case.student[5] = torch.nan
    grad_hidden, grad_weight, _ = gradients(case, gradient_filter=0.5)
    assert grad_hidden[5].isnan().all() and grad_weight.isnan().all()
    assert not grad_hidden[:5].isnan().any()


def test_nothing_valid_and_no_tokens() -> None:
    case = replace(peaked(torch.float32), mask=torch.zeros(TOKENS))
    assert all((g == 0).all() for g in gradients(case, gradient_filter=EPSILON))
    empty = replace(case, student=case.student.detach()[:0].requires_grad_(), teacher=case.teacher[:0], mask=None)
    assert all((g == 0).all() for g in gradients(empty, gradient_filter=EPSILON))


def test_no_column_between_the_thresholds() -> None:
    case = peaked(torch.float32)
    alike = replace(case, student=case.teacher.clone().requires_grad_())
    exact, filtered = gradients(alike), gradients(alike, gradient_filter=1.0)
    assert all((g != 0).any() for g in exact) and all((g == 0).all() for g in filtered[:2])


def test_significant_columns() -> None:
    gradient = torch.tensor([[0.1, 0.5, -0.5, 0.0, torch.nan, 0.1249], [0.4999, 0.0, 0.1, -0.125, 0.0, -0.1]])
    both, hidden_only = significant_columns(gradient, torch.tensor(0.5))
    assert both.tolist() == [1, 2, 4] and hidden_only.tolist() == [0, 3]
    assert PANEL_COLUMNS > 0


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, float("nan")])
def test_epsilon_outside_of_its_range(wrong: float) -> None:
    with pytest.raises(ValueError, match="gradient_filter must be a finite number above 0 and at most 1"):
        gradients(peaked(), gradient_filter=wrong)


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="gradient_filter must be a number, got 'yes'"):
        gradients(peaked(), gradient_filter="yes")
    logits = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="products with the student_head, got a student that is logits"):
        entropy_aware_kl(logits, logits, gradient_filter=0.1)


def test_slices_of_the_vocabulary_find_their_own_columns() -> None:
    case = peaked()
    chunk = -(-TOKENS // 3)  # a budget of nothing: 32 tokens at most, 512 columns
    (_, truth, _), _ = expected(case, EPSILON, chunk)
    sliced = gradients(case, reduction="sum", schedule="recompute", workspace_bytes=1, gradient_filter=EPSILON)
    assert relative_error(sliced[1], truth) < 1e-11
    assert relative_error(sliced[0], gradients(case, reduction="sum")[0]) < 0.05
