// The sums and the gradient of a block of columns under skewed divergences: docs/math.md, "Skewed divergences".
#pragma once

#include "block.h"

namespace eopd::cpu {
namespace {

struct Arithmetic {
  template <typename Value>
  static Value exp_of_nonpositive(Value x) {
    return cpu::exp_of_nonpositive(x);
  }
  template <typename Value>
  static Value log_of_share(Value x) {
    return cpu::log_of_share(x);
  }
  template <typename Value>
  static Value quotient(Value x, Value y) {
    return x / y;
  }
};

// Adds a block to its row: summed in Real within the block, in double across blocks.
template <typename Real>
void add_mixture_block(MixtureStatistics<double>& sum, const MixtureRow<Real>& row, const Real* student,
                       const Real* teacher, int count) {
  const auto [wide, narrow] = sums_of_columns<MixtureStatistics, Real>(count, [&](auto& sums, auto kind, int v) {
    using Value = decltype(kind);
    const auto column = mixture_column(row, load<Value>(student + v), load<Value>(teacher + v), Arithmetic{});
    add_mixture_columns(sums, row.skews, column, Arithmetic{});
  });
  sum.forward_kl += total<Real>(wide.forward_kl, narrow.forward_kl);
  sum.reverse_kl += total<Real>(wide.reverse_kl, narrow.reverse_kl);
  sum.forward_share += total<Real>(wide.forward_share, narrow.forward_share);
  sum.reverse_share += total<Real>(wide.reverse_share, narrow.reverse_share);
}

// Writes the gradient of a block. `out` may be `student`: a column is read before it is written.
template <typename Real>
void mixture_gradient_block(const MixtureRow<Real>& row, const ColumnCoefficients<Real>& k, bool uses_reverse,
                            bool uses_forward, const Real* student, const Real* teacher, int count, bool past_caches,
                            Real* out) {
  with_constant(uses_reverse, [&](auto has_reverse) {
    with_constant(uses_forward, [&](auto has_forward) {
      with_constant(past_caches, [&](auto streamed) {
        store_columns<streamed.value>(count, out, [&](auto kind, int v) {
          using Value = decltype(kind);
          const auto column = mixture_column(row, load<Value>(student + v), load<Value>(teacher + v), Arithmetic{});
          return mixture_column_gradient<has_reverse.value, has_forward.value>(k, row.skews, column, Arithmetic{});
        });
      });
    });
  });
}

}  // namespace
}  // namespace eopd::cpu
