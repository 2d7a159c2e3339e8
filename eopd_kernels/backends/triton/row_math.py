"""The mathematics of one row for Triton: docs/math.md, "One pass" to "Skewed divergences". csrc/row_math.h is its twin.

Written once, used by every kernel. The eight numbers travel in the order of ``statistics.FIELDS``. They are scalars (a
row, a part of one) or vectors ``[LANES]`` (each lane of a program is a partial row of its own), and every rule is the
same for both. All of it computes in the dtype of its arguments, which is float64 for float64 logits and else float32.
"""

import triton
import triton.language as tl

# On [-0.55, 0.55], x + x³·(C3 + C5·x² + ...): the odd polynomial whose largest relative error is least, 4·10⁻⁸.
TANH_BEND = tl.constexpr(0.55)
TANH_C3 = tl.constexpr(-0.33332947)
TANH_C5 = tl.constexpr(0.13320725)
TANH_C7 = tl.constexpr(-0.05267181)
TANH_C9 = tl.constexpr(0.01643758)


@triton.jit
def times_or_zero(mass, value):
    """0 · anything = 0: what has no mass has no share, even where its logarithm is infinite.

    The value is replaced, not the product, which then fuses with the sum it goes into.
    """
    return mass * tl.where(mass == 0, 0.0, value)


@triton.jit
def finite_centre(maximum):
    """What is subtracted in place of a maximum: −inf − (−inf) would be NaN where −inf is meant."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def distance(maximum, merged_max):
    """How far a part's maximum lies below the merged one, ≤ 0; 0 for an empty part, whose sums are 0 anyway."""
    return tl.where(maximum == float("-inf"), 0.0, maximum - merged_max)


@triton.jit
def recentred(
    student_max,
    student_sum,
    teacher_max,
    teacher_sum,
    teacher_self,
    teacher_cross,
    student_self,
    student_cross,
    merged_student_max,
    merged_teacher_max,
):
    """The same part seen from the merged maxima. The one merge: recentre both parts and add."""
    d_s = distance(student_max, merged_student_max)
    d_t = distance(teacher_max, merged_teacher_max)
    c_s = tl.exp(d_s)
    c_t = tl.exp(d_t)
    return (
        merged_student_max,
        c_s * student_sum,
        merged_teacher_max,
        c_t * teacher_sum,
        times_or_zero(c_t, teacher_self + teacher_sum * d_t),
        times_or_zero(c_t, teacher_cross + teacher_sum * (d_t - d_s)),
        times_or_zero(c_s, student_self + student_sum * d_s),
        times_or_zero(c_s, student_cross + student_sum * (d_s - d_t)),
    )


@triton.jit
def merged_lanes(
    student_max,  # [LANES]
    student_sum,  # [LANES]
    teacher_max,  # [LANES]
    teacher_sum,  # [LANES]
    teacher_self,  # [LANES]
    teacher_cross,  # [LANES]
    student_self,  # [LANES]
    student_cross,  # [LANES]
):
    """Lanes that hold a partial row each, merged into one: eight scalars."""
    s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = recentred(
        student_max,
        student_sum,
        teacher_max,
        teacher_sum,
        teacher_self,
        teacher_cross,
        student_self,
        student_cross,
        tl.max(student_max, 0),
        tl.max(teacher_max, 0),
    )
    return (
        s_max,
        tl.sum(s_sum, 0),
        t_max,
        tl.sum(t_sum, 0),
        tl.sum(t_self, 0),
        tl.sum(t_cross, 0),
        tl.sum(s_self, 0),
        tl.sum(s_cross, 0),
    )


@triton.jit
def with_columns(
    student_max,  # [LANES]
    student_sum,  # [LANES]
    teacher_max,  # [LANES]
    teacher_sum,  # [LANES]
    teacher_self,  # [LANES]
    teacher_cross,  # [LANES]
    student_self,  # [LANES]
    student_cross,  # [LANES]
    z_s,  # [STEPS, LANES, VECTOR]
    z_t,  # [STEPS, LANES, VECTOR]
):
    """Lanes, and in each lane its columns of a tile of transformed logits: no lane looks at another.

    A column with p = 0 adds nothing to the student's sums, one with q = 0 nothing to the teacher's. A NaN passes by the
    maximum and stays in the sum of exponentials.
    """
    tile_student_max = tl.maximum(student_max, tl.max(tl.max(z_s, 2), 0))
    tile_teacher_max = tl.maximum(teacher_max, tl.max(tl.max(z_t, 2), 0))
    s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = recentred(
        student_max,
        student_sum,
        teacher_max,
        teacher_sum,
        teacher_self,
        teacher_cross,
        student_self,
        student_cross,
        tile_student_max,
        tile_teacher_max,
    )
    ds = z_s - finite_centre(s_max)[None, :, None]
    dt = z_t - finite_centre(t_max)[None, :, None]
    exp_ds = tl.exp(ds)
    exp_dt = tl.exp(dt)
    log_ratio = ds - dt
    return (
        s_max,
        s_sum + per_lane(exp_ds),
        t_max,
        t_sum + per_lane(exp_dt),
        t_self + per_lane(times_or_zero(exp_dt, dt)),
        t_cross - per_lane(times_or_zero(exp_dt, log_ratio)),
        s_self + per_lane(times_or_zero(exp_ds, ds)),
        s_cross + per_lane(times_or_zero(exp_ds, log_ratio)),
    )


@triton.jit
def per_lane(values):  # [STEPS, LANES, VECTOR] -> [LANES]
    """Sums within each lane: a lane is a thread, so that this is register arithmetic and no exchange."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def log_sum_ratio(student_sum, teacher_sum):
    """log(Z_s/Z_t): one logarithm of the ratio, because the difference of two loses it at a small KL."""
    return tl.log(student_sum / teacher_sum)


@triton.jit
def gated_coefficients(
    student_sum,
    teacher_sum,
    teacher_self,
    student_cross,
    weight,
    gate_threshold,
    r0,
    r1,
    f0,
    f1,
):
    """The gate and a, b, c of one row; twin of ``objective.open_gate`` and ``objective.gated_coefficients``."""
    teacher_entropy = tl.log(teacher_sum) - teacher_self / teacher_sum
    opened = (teacher_entropy > gate_threshold) | (gate_threshold == float("-inf"))
    shut = (teacher_entropy <= gate_threshold) | (gate_threshold == float("inf")) | (weight == 0)
    gate = tl.where(shut, 0.0, tl.where(opened, 1.0, teacher_entropy)).to(weight.dtype)
    c_r = r0 + r1 * gate
    c_f = f0 + f1 * gate
    reverse_kl = student_cross / student_sum - log_sum_ratio(student_sum, teacher_sum)
    a = times_or_zero(weight, c_f - times_or_zero(c_r, reverse_kl))
    return gate, a, weight * c_r, weight * c_f


@triton.jit
def column_coefficients(student_sum, teacher_sum, a, b, c):
    """What is constant along the row folded in: g_v = e^ds·(own + ratio·(ds − dt)) − other·e^dt."""
    own = (a - times_or_zero(b, log_sum_ratio(student_sum, teacher_sum))) / student_sum
    return own, b / student_sum, times_or_zero(c, 1 / teacher_sum)


@triton.jit
def column_gradient(
    z_s,  # [STEPS, LANES, VECTOR]
    z_t,  # [STEPS, LANES, VECTOR]
    student_max,
    teacher_max,
    own,
    ratio,
    other,
):
    """∂L/∂z_s of a tile."""
    ds = z_s - finite_centre(student_max)
    dt = z_t - finite_centre(teacher_max)
    of_student = times_or_zero(tl.exp(ds), own + times_or_zero(ratio, ds - dt))
    return of_student - times_or_zero(other, tl.exp(dt))


@triton.jit
def scaled_masses(log_ratio):
    """p and q of a column divided by the larger, from log p − log q: nothing overflows, and NaN gives NaN twice."""
    smaller = tl.exp(-tl.abs(log_ratio))
    return tl.where(log_ratio > 0, 1.0, smaller), tl.where(log_ratio < 0, 1.0, smaller)


@triton.jit
def skewed(x, own_mass, other_mass, skew, PLAIN: tl.constexpr):
    """λ(x) = −log(skew + (1 − skew)·e^−x), the share of the mixture that is one's own, and the other's without its
    cancellation, for log-ratios ``x`` of one's own mass to the other. Twin of ``mixture.skewed``.

    ``PLAIN``: no skew, and masses that underflow are not looked at. A mask for it would spill on gfx942 in fp64.
    """
    if PLAIN:
        zero = tl.zeros_like(x)
        return x, zero, zero + 1
    own = skew * own_mass
    other = (1 - skew) * other_mass
    mixture = own + other
    return tl.minimum(x, 0.0) - tl.log(mixture), own / mixture, other / mixture


@triton.jit
def with_mixed_columns(
    forward_kl,  # [LANES]
    reverse_kl,  # [LANES]
    forward_share,  # [LANES]
    reverse_share,  # [LANES]
    z_s,  # [STEPS, LANES, VECTOR]
    z_t,  # [STEPS, LANES, VECTOR]
    student_max,
    teacher_max,
    shift,
    forward_skew,
    reverse_skew,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
):
    """Lanes, and in each lane its columns of a tile, in the order of ``mixture.FIELDS``, times Z_s or Z_t."""
    ds = z_s - finite_centre(student_max)
    dt = z_t - finite_centre(teacher_max)
    log_ratio = (ds - dt) - shift
    p, q = scaled_masses(log_ratio)
    forward_log, _, forward_other = skewed(-log_ratio, q, p, forward_skew, FORWARD_PLAIN)
    reverse_log, reverse_own, _ = skewed(log_ratio, p, q, reverse_skew, REVERSE_PLAIN)
    exp_ds = tl.exp(ds)
    exp_dt = tl.exp(dt)
    return (
        forward_kl + per_lane(times_or_zero(exp_dt, forward_log)),
        reverse_kl + per_lane(times_or_zero(exp_ds, reverse_log)),
        forward_share + per_lane(times_or_zero(exp_dt, forward_other)),
        reverse_share + per_lane(times_or_zero(exp_ds, reverse_own)),
    )


@triton.jit
def mixture_coefficients(student_sum, teacher_sum, a, b, c):
    """What is constant along the row folded in: g_v = e^ds·(own + ratio·(λ_r − s_r)) − other·e^dt·(1 − s_f)."""
    return a / student_sum, b / student_sum, times_or_zero(c, 1 / teacher_sum)


@triton.jit
def mixture_column_gradient(
    z_s,  # [STEPS, LANES, VECTOR]
    z_t,  # [STEPS, LANES, VECTOR]
    student_max,
    teacher_max,
    own,
    ratio,
    other,
    shift,
    forward_skew,
    reverse_skew,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
):
    """∂L/∂z_s of a tile."""
    ds = z_s - finite_centre(student_max)
    dt = z_t - finite_centre(teacher_max)
    log_ratio = (ds - dt) - shift
    p, q = scaled_masses(log_ratio)
    _, _, forward_other = skewed(-log_ratio, q, p, forward_skew, FORWARD_PLAIN)
    reverse_log, reverse_own, _ = skewed(log_ratio, p, q, reverse_skew, REVERSE_PLAIN)
    of_student = times_or_zero(tl.exp(ds), own + times_or_zero(ratio, reverse_log - reverse_own))
    return of_student - other * times_or_zero(tl.exp(dt), forward_other)


@triton.jit
def transformed(x, inner, outer, SOFTCAP: tl.constexpr):
    """z = softcap·tanh(scale·x / softcap) / T: inner = scale/softcap, outer = softcap/T; else inner = scale/T."""
    if SOFTCAP:
        return tanh(x * inner) * outer
    return x * inner


@triton.jit
def slope(z, inner, outer):
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
