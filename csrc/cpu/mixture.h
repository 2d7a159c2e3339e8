// A block of columns of a skewed divergence: what it adds to a row's numbers, its gradient. docs/math.md, "Skewed
// divergences".
#pragma once

#include "block.h"

namespace eopd::cpu {
namespace {

// What the columns of a row share: the centres of both sides and log(Z_s/Z_t), and the weights of the mixtures.
template <typename Real>
struct MixedRow {
  Real student_centre, teacher_centre, log_sum_ratio;
  Skews<Real> skews;
};

template <typename Real>
MixedRow<Real> mixed_row(const RowStatistics<double>& row, const double* skews) {
  return {Real(finite_centre(row.student_max)), Real(finite_centre(row.teacher_max)), Real(log_sum_ratio(row)),
          {skew_of(Real(skews[0])), skew_of(Real(skews[1]))}};
}

// ds, dt, log p - log q and their exponentials, the last one's of -|log p - log q|.
template <typename Value, typename Real>
MixedColumn<Value> mixed_column(const MixedRow<Real>& row, const Real* student, const Real* teacher, int v) {
  const Value ds = load<Value>(student + v) - row.student_centre;
  const Value dt = load<Value>(teacher + v) - row.teacher_centre;
  const Value log_ratio = (ds - dt) - row.log_sum_ratio;
  const Value distance = log_ratio > Value{} ? -log_ratio : log_ratio;
  return {log_ratio, exp_of_nonpositive(ds), exp_of_nonpositive(dt), exp_of_nonpositive(distance)};
}

struct Logarithm {
  template <typename Value>
  Value operator()(Value value) const {
    return log_of_share(value);
  }
};

// Lanes of Real sum a block; blocks are added in double.
template <typename Real>
void add_mixture_block(MixtureStatistics<double>& total, const MixedRow<Real>& row, const Real* student,
                       const Real* teacher, int count) {
  MixtureStatistics<Vector<Real>> wide;
  MixtureStatistics<Real> narrow;
  for_columns<Real>(count, [&](auto kind, int v) {
    using Value = decltype(kind);
    const MixedColumn<Value> column = mixed_column<Value>(row, student, teacher, v);
    if constexpr (std::is_same_v<Value, Real>) {
      add_column(narrow, row.skews, column, Logarithm{});
    } else {
      add_column(wide, row.skews, column, Logarithm{});
    }
  });
  total.forward_kl += sum_of_lanes(wide.forward_kl) + narrow.forward_kl;
  total.reverse_kl += sum_of_lanes(wide.reverse_kl) + narrow.reverse_kl;
  total.forward_share += sum_of_lanes(wide.forward_share) + narrow.forward_share;
  total.reverse_share += sum_of_lanes(wide.reverse_share) + narrow.reverse_share;
}

// `out` may be `student`: a column is read before it is written.
template <typename Real>
void mixture_gradient_block(const MixedRow<Real>& row, const ColumnCoefficients<Real>& k, bool uses_reverse,
                            bool uses_forward, const Real* student, const Real* teacher, int count, bool past_caches,
                            Real* out) {
  with_constant(uses_reverse, [&](auto has_reverse) {
    with_constant(uses_forward, [&](auto has_forward) {
      with_constant(past_caches, [&](auto streamed) {
        store_columns<streamed.value>(count, out, [&](auto kind, int v) {
          const auto column = mixed_column<decltype(kind)>(row, student, teacher, v);
          return column_gradient<has_reverse.value, has_forward.value>(k, row.skews, column, Logarithm{});
        });
      });
    });
  });
}

}  // namespace
}  // namespace eopd::cpu
