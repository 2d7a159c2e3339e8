// A thread's arithmetic on a few columns of a skewed divergence: docs/math.md, "Skewed divergences".
#pragma once

#include "columns.cuh"

namespace eopd::cuda {

struct Exponential {
  template <typename Real>
  __device__ __forceinline__ Real operator()(Real x) const {
    return hardware::exp_of_nonpositive(x);
  }
};

struct Logarithm {
  template <typename Real>
  __device__ __forceinline__ Real operator()(Real x) const {
    return hardware::log_of_share(x);
  }
};

// Columns one after the other: a thread of a long row sums them in fours first.
template <typename Real, int columns>
__device__ __forceinline__ void add_columns(MixtureStatistics<Real>& sums, const MixedRow<Real>& row,
                                            const Real (&z_s)[columns], const Real (&z_t)[columns]) {
  MixtureStatistics<Real> here;
#pragma unroll
  for (int v = 0; v < columns; ++v)
    add_column(here, row.skews, mixed_column(row, z_s[v], z_t[v], Exponential{}), Logarithm{});
  merge(sums, here);
}

// What is constant along a row of the gradient.
template <typename Real>
struct MixedRowGradient {
  ColumnCoefficients<Real> k;
  MixedRow<Real> mixed;
  bool has_reverse;
  bool zero;  // exactly, whatever the logits hold

  __device__ __forceinline__ MixedRowGradient(const RowStatistics<Real>& row, const RowCoefficients<Real>& of_row,
                                              const Skews<Real>& skews, const Chain<Real>& chain)
      : k(mixture_coefficients(row, of_row, slope_of(chain))),
        mixed(mixed_row(row, skews)),
        has_reverse(of_row.b != 0),
        zero(is_zero(of_row)) {}
};

template <typename Real, int columns>
__device__ __forceinline__ void gradient_of(const MixedRowGradient<Real>& row, const Real (&z_s)[columns],
                                            const Real (&z_t)[columns],
                                            Real* gradient) {  // [columns]
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    const MixedColumn<Real> column = mixed_column(row.mixed, z_s[v], z_t[v], Exponential{});
    gradient[v] = row.has_reverse ? column_gradient<true, true>(row.k, row.mixed.skews, column, Logarithm{})
                                  : column_gradient<false, true>(row.k, row.mixed.skews, column, Logarithm{});
  }
}

}  // namespace eopd::cuda
