"""The mathematics of one row for Triton: docs/math.md, "One pass" to "Skewed divergences".

Written once, used by every kernel, under the names of csrc/row_math.h and of eopd_kernels/row_math. A row's numbers are
scalars, or vectors ``[LANES]`` where each lane of a program has a partial row of its own; every rule is the same for
both. All of it computes in the dtype of its arguments, which is float64 for float64 logits and else float32.

The records hold tensors and nothing else: Triton 3.6 makes a runtime value of a constexpr in a tuple.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# On [-0.55, 0.55], x + x³·(C3 + C5·x² + ...): the odd polynomial whose largest relative error is least, 4·10⁻⁸.
TANH_BEND = tl.constexpr(0.55)
TANH_C3 = tl.constexpr(-0.33332947)
TANH_C5 = tl.constexpr(0.13320725)
TANH_C7 = tl.constexpr(-0.05267181)
TANH_C9 = tl.constexpr(0.01643758)


class RowStatistics(NamedTuple):
    """The eight numbers of a row, in the order in which they lie in memory."""

    student_max: tl.tensor
    student_sum: tl.tensor
    teacher_max: tl.tensor
    teacher_sum: tl.tensor
    teacher_self: tl.tensor
    teacher_cross: tl.tensor
    student_self: tl.tensor
    student_cross: tl.tensor


class MixtureStatistics(NamedTuple):
    """The four sums of a row's skewed divergences, in the order in which they lie in memory."""

    forward_kl: tl.tensor
    reverse_kl: tl.tensor
    forward_share: tl.tensor
    reverse_share: tl.tensor


class Coefficients(NamedTuple):
    """A row's numbers in the one gradient form: ∂L/∂z_s[v] = p_v·(a + b·(log p_v − log q_v)) − c·q_v."""

    a: tl.tensor
    b: tl.tensor
    c: tl.tensor


class ColumnCoefficients(NamedTuple):
    """The gradient form with what is constant along the row folded in: e^ds·(self + ratio·(ds − dt)) − other·e^dt."""

    self: tl.tensor
    ratio: tl.tensor
    other: tl.tensor


class Combine(NamedTuple):
    """The halves' weights as functions of the gate: c_r = reverse + reverse_gate·g, c_f = forward + forward_gate·g."""

    reverse: tl.tensor
    reverse_gate: tl.tensor
    forward: tl.tensor
    forward_gate: tl.tensor


class MixtureRow(NamedTuple):
    """What the columns of a row share: the centres of both sides, log(Z_s/Z_t), and the skews of both halves."""

    student_centre: tl.tensor
    teacher_centre: tl.tensor
    log_sum_ratio: tl.tensor
    forward_skew: tl.tensor
    reverse_skew: tl.tensor


class MixtureColumn(NamedTuple):
    """Columns of a row: log p − log q, p·Z_s, q·Z_t, and p and q divided by the larger, so that nothing overflows."""

    log_ratio: tl.tensor
    exp_ds: tl.tensor
    exp_dt: tl.tensor
    scaled_p: tl.tensor
    scaled_q: tl.tensor


class MixtureTerms(NamedTuple):
    """A column of one distribution against its mixture with the other: λ = log(own mass / mixture), and both shares of
    the mixture, the other's without the cancellation of 1 − own."""

    log_over_mixture: tl.tensor
    own_share: tl.tensor
    other_share: tl.tensor


@triton.jit
def times_or_zero(mass, value):
    """The product, in which 0 · anything = 0: what has no mass has no share, even where its logarithm is infinite.

    The value is replaced, not the product, which then fuses with the sum it goes into.
    """
    return mass * tl.where(mass == 0, 0.0, value)


@triton.jit
def finite_centre(maximum):
    """What is subtracted in place of a maximum: −inf − (−inf) would be NaN where −inf is meant."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def distance(part_max, maximum):
    """How far a part's maximum lies below the merged one, ≤ 0; 0 for an empty part, whose sums are 0 anyway."""
    return tl.where(part_max == float("-inf"), 0.0, part_max - maximum)


@triton.jit
def recentre(row, student_max, teacher_max):
    """The row's numbers after its maxima have moved up to those given."""
    d_s = distance(row.student_max, student_max)
    d_t = distance(row.teacher_max, teacher_max)
    c_s = tl.exp(d_s)
    c_t = tl.exp(d_t)
    return RowStatistics(
        student_max,
        c_s * row.student_sum,
        teacher_max,
        c_t * row.teacher_sum,
        times_or_zero(c_t, row.teacher_self + row.teacher_sum * d_t),
        times_or_zero(c_t, row.teacher_cross + row.teacher_sum * (d_t - d_s)),
        times_or_zero(c_s, row.student_self + row.student_sum * d_s),
        times_or_zero(c_s, row.student_cross + row.student_sum * (d_s - d_t)),
    )


@triton.jit
def merge(lanes):  # eight numbers [LANES] -> eight scalars
    """Merges the partial rows of all lanes: recentres each to the largest maxima, and adds."""
    row = recentre(lanes, tl.max(lanes.student_max, 0), tl.max(lanes.teacher_max, 0))
    return RowStatistics(
        row.student_max,
        tl.sum(row.student_sum, 0),
        row.teacher_max,
        tl.sum(row.teacher_sum, 0),
        tl.sum(row.teacher_self, 0),
        tl.sum(row.teacher_cross, 0),
        tl.sum(row.student_self, 0),
        tl.sum(row.student_cross, 0),
    )


@triton.jit
def add_columns(
    lanes,  # eight numbers [LANES]
    z_s,  # a group of tiles [LANES, WIDTH]
    z_t,  # as many
):
    """Adds to each lane its columns of a group of tiles of transformed logits: no lane looks at another.

    A column with p = 0 adds nothing to the student's sums, one with q = 0 nothing to the teacher's. A NaN passes by the
    maximum and stays in the sum of exponentials.
    """
    student_max, teacher_max = lanes.student_max, lanes.teacher_max
    for step in tl.static_range(len(z_s)):
        student_max = tl.maximum(student_max, tl.max(z_s[step], 1))
        teacher_max = tl.maximum(teacher_max, tl.max(z_t[step], 1))
    row = recentre(lanes, student_max, teacher_max)
    for step in tl.static_range(len(z_s)):
        ds = z_s[step] - finite_centre(student_max)[:, None]
        dt = z_t[step] - finite_centre(teacher_max)[:, None]
        exp_ds = tl.exp(ds)
        exp_dt = tl.exp(dt)
        log_ratio = ds - dt
        row = RowStatistics(
            student_max,
            row.student_sum + tl.sum(exp_ds, 1),
            teacher_max,
            row.teacher_sum + tl.sum(exp_dt, 1),
            row.teacher_self + tl.sum(times_or_zero(exp_dt, dt), 1),
            row.teacher_cross - tl.sum(times_or_zero(exp_dt, log_ratio), 1),
            row.student_self + tl.sum(times_or_zero(exp_ds, ds), 1),
            row.student_cross + tl.sum(times_or_zero(exp_ds, log_ratio), 1),
        )
    return row


@triton.jit
def log_sum_ratio(row):
    """log(Z_s/Z_t): one logarithm of the ratio, because the difference of two loses it at a small KL."""
    return tl.log(row.student_sum / row.teacher_sum)


@triton.jit
def open_gate(row, weight, threshold):
    """1 where the teacher's entropy lies above the threshold, else 0, as in rows of weight 0; NaN where the entropy is,
    unless the threshold is infinite."""
    teacher_entropy = tl.log(row.teacher_sum) - row.teacher_self / row.teacher_sum
    opened = (teacher_entropy > threshold) | (threshold == float("-inf"))
    shut = (teacher_entropy <= threshold) | (threshold == float("inf")) | (weight == 0)
    return tl.where(shut, 0.0, tl.where(opened, 1.0, teacher_entropy)).to(weight.dtype)


@triton.jit
def unused(k):
    """Whether the gradient of a row with these coefficients is exactly 0, whatever its logits hold."""
    return (k.a == 0) & (k.b == 0) & (k.c == 0)


@triton.jit
def forward_kl(row):
    """F = Σ q (log q − log p) in nats."""
    return row.teacher_cross / row.teacher_sum + log_sum_ratio(row)


@triton.jit
def reverse_kl(row):
    """R = Σ p (log p − log q) in nats."""
    return row.student_cross / row.student_sum - log_sum_ratio(row)


@triton.jit
def half_weights(gate, combine):
    """(c_r, c_f) of a row with this gate."""
    return combine.reverse + combine.reverse_gate * gate, combine.forward + combine.forward_gate * gate


@triton.jit
def gated_loss(row, gate, weight, combine):
    """The loss c_r·R + c_f·F of a row of weight 1; 0 in rows of weight 0. A half without weight may be infinite."""
    c_r, c_f = half_weights(gate, combine)
    loss = times_or_zero(c_r, reverse_kl(row)) + times_or_zero(c_f, forward_kl(row))
    return tl.where(weight == 0, 0.0, loss).to(weight.dtype)


@triton.jit
def gated_coefficients(row, gate, weight, combine):
    """The coefficients of both plain divergences in a row of this weight."""
    c_r, c_f = half_weights(gate, combine)
    a = times_or_zero(weight, c_f - times_or_zero(c_r, reverse_kl(row)))
    return Coefficients(a, weight * c_r, weight * c_f)


@triton.jit
def column_coefficients(row, k):
    """What is constant along the row of the plain gradient."""
    self = (k.a - times_or_zero(k.b, log_sum_ratio(row))) / row.student_sum
    return ColumnCoefficients(self, k.b / row.student_sum, times_or_zero(k.c, 1 / row.teacher_sum))


@triton.jit
def column_gradient(
    row,
    k,
    z_s,  # [LANES, WIDTH]
    z_t,  # [LANES, WIDTH]
):
    """∂L/∂z_s of a tile; ``k`` are column coefficients."""
    ds = z_s - row.student_centre
    dt = z_t - row.teacher_centre
    of_student = times_or_zero(tl.exp(ds), k.self + times_or_zero(k.ratio, ds - dt))
    return of_student - times_or_zero(k.other, tl.exp(dt))


@triton.jit
def mixture_row(row, forward_skew, reverse_skew):
    """What the columns of a row share, from its eight numbers."""
    return MixtureRow(
        finite_centre(row.student_max),
        finite_centre(row.teacher_max),
        log_sum_ratio(row),
        forward_skew,
        reverse_skew,
    )


@triton.jit
def mixture_column(
    row,
    z_s,  # [LANES, WIDTH]
    z_t,  # [LANES, WIDTH]
):
    """The columns of a tile, from what they share and their transformed logits; a NaN stays in both scaled masses."""
    ds = z_s - row.student_centre
    dt = z_t - row.teacher_centre
    log_ratio = (ds - dt) - row.log_sum_ratio
    smaller = tl.exp(-tl.abs(log_ratio))
    scaled_p, scaled_q = tl.where(log_ratio > 0, 1.0, smaller), tl.where(log_ratio < 0, 1.0, smaller)
    return MixtureColumn(log_ratio, tl.exp(ds), tl.exp(dt), scaled_p, scaled_q)


@triton.jit
def mixture_terms(x, own_mass, other_mass, skew, PLAIN: tl.constexpr):
    """λ(x) = −log(skew + (1 − skew)·e^−x) and the shares, for log-ratios ``x`` of one's own mass to the other.

    ``PLAIN``: no skew, and masses that underflow are not looked at. A mask for it would spill on gfx942 in fp64.
    """
    if PLAIN:
        zero = tl.zeros_like(x)
        return MixtureTerms(x, zero, zero + 1)
    own = skew * own_mass
    other = (1 - skew) * other_mass
    mixture = own + other
    return MixtureTerms(tl.minimum(x, 0.0) - tl.log(mixture), own / mixture, other / mixture)


@triton.jit
def forward_terms(row, column, PLAIN: tl.constexpr):
    """The teacher against its mixture with the student."""
    return mixture_terms(-column.log_ratio, column.scaled_q, column.scaled_p, row.forward_skew, PLAIN)


@triton.jit
def reverse_terms(row, column, PLAIN: tl.constexpr):
    """The student against its mixture with the teacher."""
    return mixture_terms(column.log_ratio, column.scaled_p, column.scaled_q, row.reverse_skew, PLAIN)


@triton.jit
def add_mixture_columns(lanes, row, column, OPTIONS: tl.constexpr):
    """Adds to each lane its columns of a tile; the sums are yet to be divided by Z_s or Z_t."""
    forward = forward_terms(row, column, OPTIONS.forward_plain)
    reverse = reverse_terms(row, column, OPTIONS.reverse_plain)
    return MixtureStatistics(
        lanes.forward_kl + tl.sum(times_or_zero(column.exp_dt, forward.log_over_mixture), 1),
        lanes.reverse_kl + tl.sum(times_or_zero(column.exp_ds, reverse.log_over_mixture), 1),
        lanes.forward_share + tl.sum(times_or_zero(column.exp_dt, forward.other_share), 1),
        lanes.reverse_share + tl.sum(times_or_zero(column.exp_ds, reverse.own_share), 1),
    )


@triton.jit
def mixture_coefficients(row, k):
    """What is constant along the row of the skewed gradient: e^ds·(self + ratio·(λ_r − s_r)) − other·e^dt·(1 − s_f)."""
    return ColumnCoefficients(k.a / row.student_sum, k.b / row.student_sum, times_or_zero(k.c, 1 / row.teacher_sum))


@triton.jit
def mixture_column_gradient(row, k, column, OPTIONS: tl.constexpr):
    """∂L/∂z_s of a tile under skewed divergences; ``k`` are column coefficients."""
    forward = forward_terms(row, column, OPTIONS.forward_plain)
    reverse = reverse_terms(row, column, OPTIONS.reverse_plain)
    factor = k.self + times_or_zero(k.ratio, reverse.log_over_mixture - reverse.own_share)
    return times_or_zero(column.exp_ds, factor) - k.other * times_or_zero(column.exp_dt, forward.other_share)


@triton.jit
def transformed(x, inner, outer, SOFTCAP: tl.constexpr):
    """z = softcap·tanh(scale·x / softcap) / T: inner = scale/softcap, outer = softcap/T; else inner = scale/T."""
    if SOFTCAP:
        return tanh(x * inner) * outer
    return x * inner


@triton.jit
def transform_slope(z, inner, outer):
    """dz/dx of a softcapped logit, read off z itself: scale·(1 − tanh²) / T."""
    tanh_x = z * (1 / outer)
    return (1 - tanh_x * tanh_x) * (inner * outer)


@triton.jit
def tanh(x):
    """Good to a few roundings of the result in fp32, of 1 in fp64. Triton's own does not run in its interpreter."""
    size = tl.abs(x)
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    large = tl.where(x < 0, -large, large)
    if x.dtype != tl.float64:
        square = x * x
        small = x + x * square * (TANH_C3 + square * (TANH_C5 + square * (TANH_C7 + square * TANH_C9)))
        large = tl.where(size < TANH_BEND, small, large)
    return large
