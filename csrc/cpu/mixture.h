// A block of columns of a skewed divergence: what it adds to a row's numbers, its gradient. docs/math.md, "Skewed
// divergences".
#pragma once

#include "block.h"

namespace eopd::cpu {
namespace {

struct Exponential {
  template <typename Value>
  Value operator()(Value value) const {
    return exp_of_nonpositive(value);
  }
};

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
    const auto column = mixed_column(row, load<Value>(student + v), load<Value>(teacher + v), Exponential{});
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
          using Value = decltype(kind);
          const auto column = mixed_column(row, load<Value>(student + v), load<Value>(teacher + v), Exponential{});
          return column_gradient<has_reverse.value, has_forward.value>(k, row.skews, column, Logarithm{});
        });
      });
    });
  });
}

}  // namespace
}  // namespace eopd::cpu
