// The mathematics of one row, for host and device: docs/math.md, "One pass", "One gradient form", "Skewed divergences".
//
// Everything is written once here and used by every kernel, under the names of its twins, eopd_kernels/row_math and
// eopd_kernels/backends/triton/row_math.py. The functions over columns take a `Value`, which is a column (a CUDA thread,
// the ragged end of a row) or a SIMD vector of columns of GCC's vector extensions: both know + - * == and ?:.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define EOPD_HD __host__ __device__ __forceinline__
#else
#define EOPD_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set. The linker must not merge what such an object instantiates from
// this header with another object's copy, so each object puts it into a namespace of its own.
#ifndef EOPD_INSTRUCTION_SET
#define EOPD_INSTRUCTION_SET generic
#endif

namespace eopd {
inline namespace EOPD_INSTRUCTION_SET {

// ---- The eight numbers of a row ------------------------------------------------------------------------------------

// The sums of a row, or of the part of it that has been seen, centred on the maxima m of its logits. The student is
// p ~ e^(s - m_s), the teacher q ~ e^(t - m_t).
template <typename Real>
struct RowStatistics {
  Real student_max = -std::numeric_limits<Real>::infinity();
  Real student_sum = 0;  // Z_s = sum e^(s - m_s)
  Real teacher_max = -std::numeric_limits<Real>::infinity();
  Real teacher_sum = 0;    // Z_t = sum e^(t - m_t)
  Real teacher_self = 0;   // A = sum e^(t - m_t) (t - m_t)
  Real teacher_cross = 0;  // P = sum e^(t - m_t) ((t - m_t) - (s - m_s))
  Real student_self = 0;   // B = sum e^(s - m_s) (s - m_s)
  Real student_cross = 0;  // Q = sum e^(s - m_s) ((s - m_s) - (t - m_t))
};

// The larger of two numbers, or NaN where either is NaN: a row's maximum cannot hide one.
template <typename Real>
EOPD_HD Real larger_or_nan(Real x, Real y) {
  return x > y || x != x ? x : y;
}

// The product, in which 0 * anything = 0: what has no mass has no share, even where its logarithm is infinite.
template <typename Value>
EOPD_HD Value times_or_zero(Value mass, Value x) {
  return mass == Value{} ? Value{} : mass * x;
}

// Moves a row's sums to higher maxima. d = m_old - m_new <= 0; an unmoved maximum costs no exponential, and -inf that
// stays -inf (nothing seen yet) has moved by 0. `exp` is of the unit that maxima and weighted sums are in.
template <typename Real, typename Exp>
EOPD_HD void recentre(RowStatistics<Real>& row, Real student_max, Real teacher_max, const Exp& exp) {
  const Real d_s = row.student_max == student_max ? Real(0) : row.student_max - student_max;
  const Real d_t = row.teacher_max == teacher_max ? Real(0) : row.teacher_max - teacher_max;
  if (d_s == 0 && d_t == 0) return;
  const Real c_s = d_s == 0 ? Real(1) : exp(d_s);
  const Real c_t = d_t == 0 ? Real(1) : exp(d_t);
  row.teacher_self = times_or_zero(c_t, row.teacher_self + times_or_zero(row.teacher_sum, d_t));
  row.teacher_cross = times_or_zero(c_t, row.teacher_cross + times_or_zero(row.teacher_sum, d_t - d_s));
  row.student_self = times_or_zero(c_s, row.student_self + times_or_zero(row.student_sum, d_s));
  row.student_cross = times_or_zero(c_s, row.student_cross + times_or_zero(row.student_sum, d_s - d_t));
  row.student_sum *= c_s;
  row.teacher_sum *= c_t;
  row.student_max = student_max;
  row.teacher_max = teacher_max;
}

template <typename Real>
EOPD_HD void recentre(RowStatistics<Real>& row, Real student_max, Real teacher_max) {
  recentre(row, student_max, teacher_max, [](Real distance) { return std::exp(distance); });
}

// Adds the six sums of a row, or of some of its columns, to others on the same centres.
template <typename Sums, typename Part>
EOPD_HD void add_sums(Sums& sums, const Part& part) {
  sums.student_sum += part.student_sum;
  sums.teacher_sum += part.teacher_sum;
  sums.teacher_self += part.teacher_self;
  sums.teacher_cross += part.teacher_cross;
  sums.student_self += part.student_self;
  sums.student_cross += part.student_cross;
}

// The one merge: blocks of a row, slices of the vocabulary, CTAs of a cluster, ranks of a group. Associative; the empty
// partial (maxima -inf, the rest 0) is its neutral element.
template <typename Real>
EOPD_HD void merge(RowStatistics<Real>& row, RowStatistics<Real> part) {
  const Real student_max = larger_or_nan(row.student_max, part.student_max);
  const Real teacher_max = larger_or_nan(row.teacher_max, part.teacher_max);
  recentre(row, student_max, teacher_max);
  recentre(part, student_max, teacher_max);
  add_sums(row, part);
}

// One logarithm of the ratio, not a difference of two: the KL is small where both are large.
template <typename Real>
EOPD_HD Real log_sum_ratio(const RowStatistics<Real>& row) {
  using std::log;
  return log(row.student_sum / row.teacher_sum);
}

template <typename Real>
EOPD_HD Real teacher_entropy(const RowStatistics<Real>& row) {
  using std::log;
  return log(row.teacher_sum) - row.teacher_self / row.teacher_sum;
}

template <typename Real>
EOPD_HD Real forward_kl(const RowStatistics<Real>& row) {
  return row.teacher_cross / row.teacher_sum + log_sum_ratio(row);
}

template <typename Real>
EOPD_HD Real reverse_kl(const RowStatistics<Real>& row) {
  return row.student_cross / row.student_sum - log_sum_ratio(row);
}

// ---- Columns into sums ---------------------------------------------------------------------------------------------

// What is subtracted in place of a maximum: -inf - (-inf) would be NaN where -inf is meant.
template <typename Real>
EOPD_HD Real finite_centre(Real maximum) {
  return maximum == -std::numeric_limits<Real>::infinity() ? Real(0) : maximum;
}

// The six sums of some columns, on centres that their user knows.
template <typename Value>
struct ColumnSums {
  Value student_sum{}, teacher_sum{}, teacher_self{}, teacher_cross{}, student_self{}, student_cross{};
};

template <typename Value>
EOPD_HD void merge(ColumnSums<Value>& sums, const ColumnSums<Value>& part) {
  add_sums(sums, part);
}

// Adds columns, given ds = s - m_s, dt = t - m_t and their exponentials. Unguarded, a column of zero mass at distance
// -inf makes the sums NaN; the caller sees that and repeats its block guarded.
template <bool guarded, typename Value>
EOPD_HD void add_columns(ColumnSums<Value>& sums, Value ds, Value dt, Value exp_ds, Value exp_dt) {
  const Value log_ratio = ds - dt;
  sums.student_sum += exp_ds;
  sums.teacher_sum += exp_dt;
  if constexpr (guarded) {
    sums.teacher_self += times_or_zero(exp_dt, dt);
    sums.teacher_cross -= times_or_zero(exp_dt, log_ratio);
    sums.student_self += times_or_zero(exp_ds, ds);
    sums.student_cross += times_or_zero(exp_ds, log_ratio);
  } else {
    sums.teacher_self += exp_dt * dt;
    sums.teacher_cross -= exp_dt * log_ratio;
    sums.student_self += exp_ds * ds;
    sums.student_cross += exp_ds * log_ratio;
  }
}

// ---- From the numbers to the gradient ------------------------------------------------------------------------------

// A row's numbers in the one gradient form: dL/dz_s[v] = p_v (a + b (log p_v - log q_v)) - c q_v.
template <typename Real>
struct Coefficients {
  Real a, b, c;
};

// Whether the gradient of a row is exactly 0, whatever its logits hold.
template <typename Real>
EOPD_HD bool unused(const Coefficients<Real>& k) {
  return k.a == 0 && k.b == 0 && k.c == 0;
}

// 1 where the teacher's entropy lies above the threshold, else 0; NaN where it is NaN, because a gate that a NaN shuts
// would silently take its row out of the loss. Thresholds of -inf and inf, "always" and "never", ask nothing of the row.
template <typename Real>
EOPD_HD Real open_gate(const RowStatistics<Real>& row, Real threshold) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  const Real entropy = teacher_entropy(row);
  if (entropy > threshold || threshold == -infinity) return 1;
  return entropy <= threshold || threshold == infinity ? Real(0) : entropy;
}

// The weights of both divergences as functions of the gate g: c_r = reverse + reverse_gate g, c_f = forward +
// forward_gate g.
template <typename Real>
struct Combine {
  Real reverse, reverse_gate, forward, forward_gate;

  EOPD_HD Real of_reverse(Real gate) const { return reverse + reverse_gate * gate; }
  EOPD_HD Real of_forward(Real gate) const { return forward + forward_gate * gate; }
};

template <typename Real>
Combine<Real> combine_of(const std::array<double, 4>& numbers) {
  return {Real(numbers[0]), Real(numbers[1]), Real(numbers[2]), Real(numbers[3])};
}

// The loss of a row of weight 1: c_r R + c_f F. A divergence without weight may be infinite.
template <typename Real>
EOPD_HD Real gated_loss(const RowStatistics<Real>& row, Real gate, const Combine<Real>& combine) {
  return times_or_zero(combine.of_reverse(gate), reverse_kl(row)) +
         times_or_zero(combine.of_forward(gate), forward_kl(row));
}

// The coefficients of both plain divergences in a row of this weight.
template <typename Real>
EOPD_HD Coefficients<Real> gated_coefficients(const RowStatistics<Real>& row, Real gate, Real weight,
                                              const Combine<Real>& combine) {
  const Real c_r = combine.of_reverse(gate);
  const Real c_f = combine.of_forward(gate);
  return {weight * (c_f - times_or_zero(c_r, reverse_kl(row))), weight * c_r, weight * c_f};
}

// The gradient form with everything that is constant along the row folded in:
// g_v = e^ds (self + ratio (ds - dt)) - other e^dt
template <typename Real>
struct ColumnCoefficients {
  Real self, ratio, other;
};

// Divides by the sums; a term that is not used is 0 even where they are not numbers. `slope` is dz/dx where that is one
// number for the row, else 1.
template <typename Real>
EOPD_HD ColumnCoefficients<Real> over_sums(const RowStatistics<Real>& row, Real self, Real ratio, Real other,
                                           Real slope) {
  ratio = ratio == 0 ? Real(0) : ratio / row.student_sum;
  other = other == 0 ? Real(0) : other / row.teacher_sum;
  return {self / row.student_sum * slope, ratio * slope, other * slope};
}

template <typename Real>
EOPD_HD ColumnCoefficients<Real> column_coefficients(const RowStatistics<Real>& row, const Coefficients<Real>& k,
                                                     Real slope) {
  const Real shift = k.b == 0 ? Real(0) : k.b * log_sum_ratio(row);
  return over_sums(row, k.a - shift, k.b, k.c, slope);
}

// g_v of columns. `has_ratio` and `has_other` say whether b and c are used: with b = 0 the log-ratio may be infinite,
// with c = 0 the teacher's exponential need not exist. Unguarded, a column of zero mass may become NaN; the caller sees
// that, as with add_columns.
template <bool has_ratio, bool has_other, bool guarded = true, typename Value, typename Real>
EOPD_HD Value column_gradient(const ColumnCoefficients<Real>& k, Value ds, Value dt, Value exp_ds, Value exp_dt) {
  Value factor = k.self + Value{};
  if constexpr (has_ratio) factor += k.ratio * (ds - dt);
  Value gradient = exp_ds * factor;
  if constexpr (guarded) gradient = exp_ds == Value{} ? Value{} : gradient;
  if constexpr (has_other) gradient -= k.other * exp_dt;
  return gradient;
}

// dz/dx of a softcapped logit z = softcap tanh(scale x / softcap) / T, read off z itself: tanh = z T / softcap.
template <typename Value, typename Real>
EOPD_HD Value transform_slope(Value z, Real scale_over_temperature, Real temperature_over_softcap) {
  const Value tanh = z * temperature_over_softcap;
  return scale_over_temperature * (Real(1) - tanh * tanh);
}

// ---- Skewed divergences --------------------------------------------------------------------------------------------
//
// The caller's `Arithmetic` has what a Value has no operator for: exp_of_nonpositive(x), log_of_share(x) of x in (0, 1],
// and the quotient(x, y) of 0 <= x <= y <= 1, which becomes a share and may be rounded more than a division is.

// The weights of a mixture: that of the distribution compared with it, and the other's. They add up to 1 exactly, so that
// a column of equal masses adds exactly 0.
template <typename Real>
struct Skew {
  Real own, other;
};

template <typename Real>
EOPD_HD Skew<Real> skew_of(Real own) {
  return {own, 1 - own};
}

template <typename Real>
struct Skews {
  Skew<Real> forward, reverse;
};

template <typename Real>
Skews<Real> skews_of(const std::array<double, 2>& own) {
  return {skew_of(Real(own[0])), skew_of(Real(own[1]))};
}

// A column of one distribution against its mixture with the other: lambda = log(own mass / mixture), and the shares that
// both have in the mixture; `other_share` = 1 - `own_share` without its cancellation.
template <typename Value>
struct MixtureTerms {
  Value log_over_mixture, own_share, other_share;
};

// The terms of x = log(own mass / other mass). Both masses are divided by the larger, so that nothing overflows:
// `smaller` = e^-|x|.
template <typename Value, typename Real, typename Arithmetic>
EOPD_HD MixtureTerms<Value> mixture_terms(const Skew<Real>& skew, Value x, Value smaller, const Arithmetic& arithmetic) {
  const Value zero{}, one = zero + Real(1);
  if (skew.own == 0) return {x, zero, one};
  const Value own = skew.own * (x > zero ? one : smaller);
  const Value other = skew.other * (x > zero ? smaller : one);
  const Value mixture = own + other;
  return {(x > zero ? zero : x) - arithmetic.log_of_share(mixture), arithmetic.quotient(own, mixture),
          arithmetic.quotient(other, mixture)};
}

// What a visit of some columns adds to a row's skewed divergences; over all columns they add up.
template <typename Value>
struct MixtureStatistics {
  Value forward_kl{};     // F = sum q lambda_f(log q - log p)
  Value reverse_kl{};     // R = sum p lambda_r(log p - log q)
  Value forward_share{};  // U = sum q (1 - s_f)
  Value reverse_share{};  // W = sum p s_r
};

template <typename Value>
EOPD_HD void merge(MixtureStatistics<Value>& sums, const MixtureStatistics<Value>& part) {
  sums.forward_kl += part.forward_kl;
  sums.reverse_kl += part.reverse_kl;
  sums.forward_share += part.forward_share;
  sums.reverse_share += part.reverse_share;
}

// What the columns of a row share: the centres of both sides, log(Z_s/Z_t), and the weights of the mixtures.
template <typename Real>
struct MixtureRow {
  Real student_centre, teacher_centre, log_sum_ratio;
  Skews<Real> skews;
};

template <typename Real, typename Wide>
EOPD_HD MixtureRow<Real> mixture_row(const RowStatistics<Wide>& row, const Skews<Real>& skews) {
  return {Real(finite_centre(row.student_max)), Real(finite_centre(row.teacher_max)), Real(log_sum_ratio(row)), skews};
}

template <typename Value>
struct MixtureColumn {
  Value log_ratio;       // log p - log q
  Value exp_ds, exp_dt;  // p Z_s, q Z_t
  Value smaller;         // e^-|log_ratio|
};

template <typename Value, typename Real, typename Arithmetic>
EOPD_HD MixtureColumn<Value> mixture_column(const MixtureRow<Real>& row, Value s, Value t, const Arithmetic& arithmetic) {
  const Value ds = s - row.student_centre, dt = t - row.teacher_centre;
  const Value log_ratio = (ds - dt) - row.log_sum_ratio;
  const Value distance = log_ratio > Value{} ? -log_ratio : log_ratio;
  return {log_ratio, arithmetic.exp_of_nonpositive(ds), arithmetic.exp_of_nonpositive(dt),
          arithmetic.exp_of_nonpositive(distance)};
}

// Adds columns to a row's sums, which normalised() divides by Z_s and Z_t.
template <typename Value, typename Real, typename Arithmetic>
EOPD_HD void add_mixture_columns(MixtureStatistics<Value>& sums, const Skews<Real>& skews,
                                 const MixtureColumn<Value>& column, const Arithmetic& arithmetic) {
  const MixtureTerms<Value> forward = mixture_terms(skews.forward, -column.log_ratio, column.smaller, arithmetic);
  const MixtureTerms<Value> reverse = mixture_terms(skews.reverse, column.log_ratio, column.smaller, arithmetic);
  sums.forward_kl += times_or_zero(column.exp_dt, forward.log_over_mixture);
  sums.reverse_kl += times_or_zero(column.exp_ds, reverse.log_over_mixture);
  sums.forward_share += times_or_zero(column.exp_dt, forward.other_share);
  sums.reverse_share += times_or_zero(column.exp_ds, reverse.own_share);
}

template <typename Real>
EOPD_HD MixtureStatistics<Real> normalised(const MixtureStatistics<Real>& sums, const RowStatistics<Real>& row) {
  return {sums.forward_kl / row.teacher_sum, sums.reverse_kl / row.student_sum, sums.forward_share / row.teacher_sum,
          sums.reverse_share / row.student_sum};
}

// What is constant along a row of dL/dz_s[v] = p_v (a + b (lambda_r - s_r)) - c q_v (1 - s_f); unlike the plain form's,
// `self` has no log-ratio folded in.
template <typename Real>
EOPD_HD ColumnCoefficients<Real> mixture_coefficients(const RowStatistics<Real>& row, const Coefficients<Real>& k,
                                                      Real slope) {
  return over_sums(row, k.a, k.b, k.c, slope);
}

// dL/dz_s of columns. `has_reverse` and `has_forward` say whether b and c are used.
template <bool has_reverse, bool has_forward, typename Value, typename Real, typename Arithmetic>
EOPD_HD Value mixture_column_gradient(const ColumnCoefficients<Real>& k, const Skews<Real>& skews,
                                      const MixtureColumn<Value>& column, const Arithmetic& arithmetic) {
  Value factor = k.self + Value{};
  if constexpr (has_reverse) {
    const MixtureTerms<Value> reverse = mixture_terms(skews.reverse, column.log_ratio, column.smaller, arithmetic);
    factor += k.ratio * (reverse.log_over_mixture - reverse.own_share);
  }
  Value gradient = times_or_zero(column.exp_ds, factor);
  if constexpr (has_forward) {
    const MixtureTerms<Value> forward = mixture_terms(skews.forward, -column.log_ratio, column.smaller, arithmetic);
    gradient -= k.other * times_or_zero(column.exp_dt, forward.other_share);
  }
  return gradient;
}

}  // namespace EOPD_INSTRUCTION_SET
}  // namespace eopd
