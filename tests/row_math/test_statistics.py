"""The eight numbers: what is derived from them, and the one merge."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopd_kernels.row_math.statistics import FIELDS, RowStatistics
from tests.conftest import logits_like


def by_definition(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The derived figures, straight from softmax."""
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "teacher_entropy": -(q * log_q).sum(1),
        "student_entropy": -(p * log_p).sum(1),
        "forward_kl": (q * (log_q - log_p)).sum(1),
        "reverse_kl": (p * (log_p - log_q)).sum(1),
    }


def pair(n: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = logits_like(generator, n, vocab_size).double()
    return student, student + torch.randn(n, vocab_size, generator=generator)


def test_the_fields_are_what_their_names_say() -> None:
    student, teacher = pair(5, 30)
    m_s, m_t = student.amax(1, True), teacher.amax(1, True)
    e_s, e_t = (student - m_s).exp(), (teacher - m_t).exp()
    s, t = student - m_s, teacher - m_t
    expected = {
        "student_max": m_s.squeeze(1),
        "student_sum": e_s.sum(1),
        "teacher_max": m_t.squeeze(1),
        "teacher_sum": e_t.sum(1),
        "teacher_self": (e_t * t).sum(1),
        "teacher_cross": (e_t * (t - s)).sum(1),
        "student_self": (e_s * s).sum(1),
        "student_cross": (e_s * (s - t)).sum(1),
    }
    packed = RowStatistics.of(student, teacher).packed
    for i, name in enumerate(FIELDS):
        torch.testing.assert_close(packed[:, i], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_derived_figures_equal_their_definitions() -> None:
    student, teacher = pair(7, 200)
    statistics = RowStatistics.of(student, teacher)
    for name, expected in by_definition(student, teacher).items():
        torch.testing.assert_close(getattr(statistics, name), expected, rtol=1e-10, atol=1e-10, msg=name)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 99), shift=st.sampled_from([0.0, 300.0, -300.0])
)
def test_merging_any_partition_gives_the_whole(cuts: list[int], seed: int, shift: float) -> None:
    student, teacher = pair(3, 61, seed)
    student = student + shift
    edges = sorted({0, 61, *cuts})
    total = RowStatistics.empty(3, torch.float64, student.device)
    for a, b in itertools.pairwise(edges):
        total = total.merge(RowStatistics.of(student[:, a:b], teacher[:, a:b]))
    for name, expected in by_definition(student, teacher).items():
        torch.testing.assert_close(getattr(total, name), expected, rtol=1e-9, atol=1e-9, msg=name)


def test_the_merge_is_associative_and_commutative() -> None:
    student, teacher = pair(4, 90)
    a, b, c = (RowStatistics.of(student[:, i : i + 30], teacher[:, i : i + 30]) for i in (0, 30, 60))
    for other in (a.merge(b.merge(c)), c.merge(a).merge(b)):
        torch.testing.assert_close(a.merge(b).merge(c).packed, other.packed, rtol=1e-12, atol=1e-12)


def test_an_empty_part_adds_nothing_on_either_side() -> None:
    part = RowStatistics.of(*pair(4, 50))
    empty = RowStatistics.empty(4, torch.float64, torch.device("cpu"))
    for merged in (empty.merge(part), part.merge(empty)):
        assert torch.equal(merged.packed, part.packed)
    assert torch.equal(empty.merge(empty).packed, empty.packed)


@pytest.mark.parametrize("whole_slice", [False, True])
def test_columns_without_mass_on_both_sides_count_for_nothing(whole_slice: bool) -> None:
    student, teacher = pair(4, 60)
    dead = slice(30, 60) if whole_slice else slice(25, 40)
    alive = torch.ones(60, dtype=torch.bool)
    alive[dead] = False
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, dead] = masked_teacher[:, dead] = -math.inf
    parts = [RowStatistics.of(masked_student[:, c], masked_teacher[:, c]) for c in (slice(0, 30), slice(30, 60))]
    for name, expected in by_definition(student[:, alive], teacher[:, alive]).items():
        torch.testing.assert_close(getattr(parts[0].merge(parts[1]), name), expected, rtol=1e-10, atol=1e-10, msg=name)


def test_an_infinite_part_that_has_no_mass_in_the_whole_counts_for_nothing() -> None:
    student, teacher = pair(4, 60)
    student[:, 40] = -math.inf  # the second part's forward KL is infinite by itself
    teacher[:, 30:] -= 1e4  # and has no mass beside the first part's
    parts = [RowStatistics.of(student[:, c], teacher[:, c]) for c in (slice(0, 30), slice(30, 60))]
    assert (parts[1].forward_kl == math.inf).all()
    whole, merged = RowStatistics.of(student, teacher), parts[0].merge(parts[1])
    torch.testing.assert_close(merged.forward_kl, whole.forward_kl, rtol=1e-12, atol=1e-12)
    assert merged.forward_kl.isfinite().all()


def test_a_side_without_mass_makes_the_other_sides_kl_infinite() -> None:
    student, teacher = pair(2, 40)
    only_student = teacher.clone()
    only_student[:, 7] = -math.inf
    statistics = RowStatistics.of(student, only_student)
    assert (statistics.reverse_kl == math.inf).all() and statistics.forward_kl.isfinite().all()
    only_teacher = student.clone()
    only_teacher[:, 7] = -math.inf
    statistics = RowStatistics.of(only_teacher, teacher)
    assert (statistics.forward_kl == math.inf).all() and statistics.reverse_kl.isfinite().all()
