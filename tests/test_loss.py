"""The public front: masks, labels, denominators, reductions, vocabularies, and the outputs of each token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopd_kernels import EntropyAwareKLLoss, EntropyGate, LMHead, Objective, entropy_aware_kl, reference
from tests.conftest import Case, interpreted, logits_like, make_case, relative_error, size, skip_unless, upstream_for

PER_TOKEN = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "gate")


def solved(case: Case, function: object = entropy_aware_kl, **options: object) -> tuple[Tensor, list[Tensor]]:
    out = function(case.student, case.teacher, **{**case.arguments, **options})  # type: ignore[operator]
    return out.loss, list(torch.autograd.grad(out.loss, case.leaves, upstream_for(out.loss)))


def assert_equal(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], bound: float = 1e-5) -> None:
    assert relative_error(ours[0], theirs[0]) < bound
    for value, truth in zip(ours[1], theirs[1], strict=True):
        assert relative_error(value, truth) < bound


@pytest.mark.parametrize("sides", [("logits", "logits"), ("hidden", "hidden")])
def test_outputs_per_token(sides: tuple[str, str], backend: str) -> None:
    case = make_case(student=sides[0], teacher=sides[1], masked=True, **size(backend))
    assert case.mask is not None
    ours = entropy_aware_kl(case.student, case.teacher, **case.arguments, backend=backend)
    truth = reference.entropy_aware_kl(case.student, case.teacher, **case.arguments)
    for name in PER_TOKEN:
        value = getattr(ours, name)
        assert value.shape == case.mask.shape and value.dtype == torch.float32 and not value.requires_grad
        assert (value[~case.mask] == 0).all()
        assert relative_error(value, getattr(truth, name)) < 1e-5
    assert set(ours.gate.unique().tolist()) == {0.0, 1.0}
    gate, alpha = ours.gate, case.objective.alpha
    by_hand = ((ours.reverse_kl + alpha * gate * ours.forward_kl) * case.mask).sum() / case.mask.sum()
    torch.testing.assert_close(ours.loss.detach(), by_hand)


def test_mask_and_labels_say_the_same() -> None:
    case = make_case(masked=True)
    assert case.mask is not None
    labels = torch.where(case.mask, torch.arange(case.mask.numel()).view(case.mask.shape), -100)
    expected = solved(case)
    assert_equal(solved(case, mask=None, labels=labels), expected, 1e-7)
    assert_equal(solved(case, mask=None, labels=labels + 100, ignore_index=0), expected, 1e-7)
    assert_equal(solved(case, mask=case.mask.long()), expected, 1e-7)
    assert_equal(solved(case, mask=torch.ones_like(case.mask), labels=labels), expected, 1e-7)
    first, second = case.mask.clone(), case.mask.clone()
    first[0], second[1:] = True, True
    both = solved(case, mask=first, labels=torch.where(second, 3, -100))
    assert_equal(both, expected, 1e-7)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_a_mask_of_numbers_weighs_tokens_and_leaves_the_count_alone(student: str, schedule: str) -> None:
    case = make_case(student=student)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(3, 37, generator=generator).abs() * (torch.rand(3, 37, generator=generator) > 0.4)
    assert_equal(solved(case, mask=weights, schedule=schedule), solved(case, reference.entropy_aware_kl, mask=weights))
    per_token = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "mask": weights}, reduction="none")
    mean = entropy_aware_kl(case.student, case.teacher, **{**case.arguments, "mask": weights})
    torch.testing.assert_close(mean.loss, per_token.loss.sum() / (weights != 0).sum())


@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_masked_tokens_count_for_nothing_whatever_they_hold(student: str, backend: str) -> None:
    case = make_case(student=student, masked=True, **size(backend))
    assert case.mask is not None
    expected = solved(case, backend=backend)
    poisoned = case.to(torch.float32)
    with torch.no_grad():
        poisoned.student[~case.mask] = math.nan
        poisoned.teacher[~case.mask] = math.inf
    assert_equal(solved(poisoned, backend=backend), expected, 1e-7)
    assert_equal(solved(poisoned, backend=backend, schedule="recompute"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("student", ["logits", "hidden"])
def test_nothing_valid_is_a_zero_attached_to_the_graph(student: str, reduction: str, backend: str) -> None:
    case = make_case(student=student, **size(backend))
    tokens = case.student.shape[:-1]
    for mask in (torch.zeros(tokens), torch.zeros(tokens, dtype=torch.bool)):
        loss, gradients = solved(case, mask=mask, reduction=reduction, backend=backend)
        assert loss.requires_grad and (loss == 0).all()
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("leading", [(0,), (3, 0)])
@pytest.mark.parametrize("student", ["logits", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(leading: tuple[int, ...], student: str, reduction: str, backend: str) -> None:
    case = make_case(leading=leading, student=student)
    loss, gradients = solved(case, reduction=reduction, backend=backend)
    assert loss.shape == (leading if reduction == "none" else ()) and (loss == 0).all()
    for leaf, gradient in zip(case.leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize("num_items", [250, 12.5, torch.tensor(250), torch.tensor(33.0), torch.tensor([7])])
def test_num_items_replaces_the_count(num_items: float | Tensor) -> None:
    case = make_case(masked=True)
    total, gradients = solved(case, reduction="sum")
    n = float(num_items)
    assert_equal(solved(case, num_items=num_items), (total / n, [g / n for g in gradients]))


def test_micro_batches_of_unequal_length_add_up_to_the_batch() -> None:
    case = make_case(leading=(4, 25), masked=True)
    assert case.mask is not None
    whole, gradients = solved(case)
    valid = case.mask.sum()
    parts = [slice(0, 1), slice(1, 4)]
    losses = [
        entropy_aware_kl(
            case.student[p], case.teacher[p], **{**case.arguments, "mask": case.mask[p]}, num_items=valid
        ).loss
        for p in parts
    ]
    loss = torch.stack(losses).sum()
    assert_equal((loss, list(torch.autograd.grad(loss, case.leaves, upstream_for(loss)))), (whole, gradients))


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize(
    "sides", [("logits", "logits"), ("hidden", "hidden"), ("logits", "hidden"), ("hidden", "logits")]
)
def test_a_common_prefix_of_two_vocabularies(sides: tuple[str, str], schedule: str) -> None:
    small = make_case(student=sides[0], teacher=sides[1], vocab_size=600)
    expected = solved(small, schedule=schedule)
    generator = torch.Generator().manual_seed(2)

    def padded(tensor: Tensor, head: LMHead | None, extra: int) -> tuple[Tensor, LMHead | None]:
        if head is None:
            tail = logits_like(generator, *tensor.shape[:-1], extra)
            return torch.cat([tensor.detach(), tail], -1).requires_grad_(tensor.requires_grad), None
        tail = torch.randn(extra, head.weight.shape[1], generator=generator)
        weight = torch.cat([head.weight.detach(), tail]).requires_grad_(head.weight.requires_grad)
        return tensor, LMHead(weight)

    student, student_head = padded(small.student, small.student_head, 13)
    teacher, teacher_head = padded(small.teacher, small.teacher_head, 4)
    large = Case(student, teacher, student_head, teacher_head, None, small.objective)
    loss, gradients = solved(large, vocab_size=600, schedule=schedule)
    leaf = 0 if sides[0] == "logits" else 1
    kept = gradients[leaf][..., :600] if sides[0] == "logits" else gradients[leaf][:600]
    rest = gradients[leaf][..., 600:] if sides[0] == "logits" else gradients[leaf][600:]
    assert (rest == 0).all() and rest.numel() > 0
    gradients[leaf] = kept
    assert_equal((loss, gradients), expected)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("layout", ["shifted", "transposed", "strided", "vocabulary first", "expanded"])
def test_views_need_no_care(layout: str, schedule: str, backend: str) -> None:
    """Non-contiguous logits give what their contiguous copies give, in value and gradient."""
    skip_unless(schedule == "chunked", backend)
    generator = torch.Generator().manual_seed(0)

    def view(base: Tensor) -> Tensor:
        return {
            "shifted": lambda: base[:, :-1],
            "transposed": lambda: base.transpose(0, 1),
            "strided": lambda: base[:, ::2, 1::3],
            "vocabulary first": lambda: base.transpose(1, 2),
            "expanded": lambda: base[:, :1].expand(-1, 9, -1),
        }[layout]()

    bases = [logits_like(generator, 4, 10 if interpreted(backend) else 40, 40) for _ in range(2)]
    results = []
    for dense in (False, True):
        leaf = bases[0].clone().requires_grad_()
        student, teacher = view(leaf), view(bases[1])
        if dense:
            student, teacher = student.contiguous(), teacher.contiguous()
        options = {"schedule": schedule, "backend": backend, "workspace_bytes": 1}
        out = entropy_aware_kl(student, teacher, objective=Objective(gate=EntropyGate(1.0)), **options)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(out.loss, leaf, torch.tensor(-0.7))
        results.append((out.loss, out.reverse_kl, gradient))
    # A GPU's threads share a row out by its alignment, so that its sums are rounded otherwise.
    for strided, plain in zip(*results, strict=True):
        assert relative_error(strided, plain) < (3e-6 if backend == "cuda" else 1e-6)


def test_a_nan_in_one_row_stays_there(backend: str) -> None:
    for student in ("logits", "hidden"):
        case = make_case(student=student, **size(backend))
        with torch.no_grad():
            case.student[1, 3] = math.nan
        out = entropy_aware_kl(case.student, case.teacher, **case.arguments, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, case.student, torch.ones_like(out.loss))
        bad = torch.zeros(case.student.shape[:-1], dtype=torch.bool)
        bad[1, 3] = True
        for figure in (out.loss, out.reverse_kl, out.forward_kl, out.student_entropy):
            assert torch.equal(figure.isnan(), bad)
        assert out.teacher_entropy.isfinite().all()
        assert torch.equal(gradient.isnan().any(-1), bad)


def test_a_vocabulary_of_one(backend: str) -> None:
    case = make_case(**{**size(backend), "vocab_size": 1})
    loss, gradients = solved(case, backend=backend)
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_the_module_remembers_its_options() -> None:
    case = make_case(masked=True)
    loss = EntropyAwareKLLoss(case.objective, reduction="sum", schedule="recompute", backend="torch")
    ours = loss(
        case.student, case.teacher, student_head=case.student_head, teacher_head=case.teacher_head, mask=case.mask
    )
    expected = entropy_aware_kl(
        case.student, case.teacher, **case.arguments, reduction="sum", schedule="recompute", backend="torch"
    )
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.gate, expected.gate)
    assert "alpha=0.7" in repr(loss) and not list(loss.parameters())


@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    """Permuted, sliced, stepped and expanded logits on either side equal their contiguous copies."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    shape = [*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), data.draw(st.integers(1, 70))]

    def strided() -> Tensor:
        order = data.draw(st.permutations(range(len(shape))))
        steps = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=len(shape), max_size=len(shape)))
        offset = data.draw(st.sampled_from([0, 1]))
        base = logits_like(generator, *(shape[axis] * steps[axis] + offset for axis in order))
        view = base.permute(*(order.index(axis) for axis in range(len(shape))))
        view = view[tuple(slice(offset, offset + n * step, step) for n, step in zip(shape, steps, strict=True))]
        return view[:1].expand(shape) if data.draw(st.booleans()) else view

    student, teacher = strided(), strided()
    schedule = data.draw(st.sampled_from(["chunked", "recompute"]))
    results = []
    for s, t in ((student, teacher), (student.contiguous(), teacher.contiguous())):
        leaf = s.detach().requires_grad_()
        out = entropy_aware_kl(
            leaf, t, schedule=schedule, objective=Objective(gate=EntropyGate(1.0)), workspace_bytes=1
        )
        results.append((out.loss, out.reverse_kl, *torch.autograd.grad(out.loss, leaf, torch.tensor(-0.7))))
    for of_views, of_copies in zip(*results, strict=True):
        torch.testing.assert_close(of_views, of_copies, rtol=1e-5, atol=1e-6)
