// A thread's arithmetic on a few columns of a skewed divergence: docs/math.md, "Skewed divergences".
#pragma once

#include "columns.cuh"

namespace eopd::cuda {

struct Arithmetic {
  template <typename Real>
  static __device__ __forceinline__ Real exp_of_nonpositive(Real x) {
    return hardware::exp_of_nonpositive(x);
  }
  template <typename Real>
  static __device__ __forceinline__ Real log_of_share(Real x) {
    return hardware::log_of_share(x);
  }
  template <typename Real>
  static __device__ __forceinline__ Real quotient(Real x, Real y) {
    return hardware::quotient(x, y);
  }
};

// Adds a group of columns to a thread's sums, one after the other: a thread of a long row sums them in fours first.
template <typename Real, int columns>
__device__ __forceinline__ void add_group(MixtureStatistics<Real>& sums, const MixtureRow<Real>& row,
                                          const Real (&z_s)[columns], const Real (&z_t)[columns]) {
  MixtureStatistics<Real> here;
#pragma unroll
  for (int v = 0; v < columns; ++v)
    add_mixture_columns(here, row.skews, mixture_column(row, z_s[v], z_t[v], Arithmetic{}), Arithmetic{});
  merge(sums, here);
}

// What is constant along a row of the skewed gradient.
template <typename Real>
struct MixtureRowGradient {
  ColumnCoefficients<Real> k;
  MixtureRow<Real> mixed;
  bool has_reverse;
  bool zero;  // exactly, whatever the logits hold

  __device__ __forceinline__ MixtureRowGradient(const RowStatistics<Real>& row, const Coefficients<Real>& of_row,
                                              const Skews<Real>& skews, const Slope<Real>& slope)
      : k(mixture_coefficients(row, of_row, slope.of_row())),
        mixed(mixture_row(row, skews)),
        has_reverse(of_row.b != 0),
        zero(unused(of_row)) {}
};

template <typename Real, int columns>
__device__ __forceinline__ void gradient_of(const MixtureRowGradient<Real>& row, const Real (&z_s)[columns],
                                            const Real (&z_t)[columns],
                                            Real* gradient) {  // [columns]
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    const MixtureColumn<Real> column = mixture_column(row.mixed, z_s[v], z_t[v], Arithmetic{});
    gradient[v] = row.has_reverse ? mixture_column_gradient<true, true>(row.k, row.mixed.skews, column, Arithmetic{})
                                  : mixture_column_gradient<false, true>(row.k, row.mixed.skews, column, Arithmetic{});
  }
}

}  // namespace eopd::cuda
