// A thread's arithmetic on a few columns in registers: docs/math.md, "One pass" and "One gradient form".
#pragma once

#include "../row_math.h"
#include "hardware.cuh"

namespace eopd::cuda {

// A transform in the factors it takes per logit: z = outer tanh(inner x) with a softcap, inner x without.
template <typename Real>
struct LogitTransform {
  Real inner, outer;
  bool softcap;

  __device__ __forceinline__ Real operator()(Real x) const {
    return softcap ? outer * hardware::tanh_of(inner * x) : inner * x;
  }
};

template <typename Real, int columns>
__device__ __forceinline__ void transform(const LogitTransform<Real>& to_z, Real (&x)[columns]) {
#pragma unroll
  for (int v = 0; v < columns; ++v) x[v] = to_z(x[v]);
}

// The sums of these columns alone.
template <bool guarded, typename Real, int columns>
__device__ __forceinline__ ColumnSums<Real> sums_of(const Real (&z_s)[columns], const Real (&z_t)[columns],
                                                    Real student_centre, Real teacher_centre) {
  ColumnSums<Real> sums;
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    const Real ds = z_s[v] - student_centre, dt = z_t[v] - teacher_centre;
    add_columns<guarded>(sums, ds, dt, hardware::exp_of_nonpositive(ds), hardware::exp_of_nonpositive(dt));
  }
  return sums;
}

// Adds a group of columns to a thread's partial row, which is brought to a new maximum once per group. The sums are taken
// without guards first: -inf columns and NaN leave traces in them, and such a group is done again. Maxima pass over NaN,
// the sums do not.
template <typename Real, int columns>
__device__ __forceinline__ void add_group(RowStatistics<Real>& row, const Real (&z_s)[columns],
                                            const Real (&z_t)[columns]) {
  Real student_max = row.student_max, teacher_max = row.teacher_max;
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    student_max = hardware::larger(student_max, z_s[v]);
    teacher_max = hardware::larger(teacher_max, z_t[v]);
  }
  recentre(row, student_max, teacher_max);
  const Real student_centre = finite_centre(student_max), teacher_centre = finite_centre(teacher_max);
  ColumnSums<Real> sums = sums_of<false>(z_s, z_t, student_centre, teacher_centre);
  const Real trace = sums.teacher_self + sums.teacher_cross + sums.student_self + sums.student_cross;
  if (!(trace - trace == 0)) sums = sums_of<true>(z_s, z_t, student_centre, teacher_centre);
  add_sums(row, sums);
}

// dz/dx of the student: one number for the row, or with a softcap one that is read off z.
template <typename Real>
struct Slope {
  Real scale_over_temperature, temperature_over_softcap;
  bool softcap;

  // The slope where it is one number for the row, else 1.
  __device__ __forceinline__ Real of_row() const { return softcap ? Real(1) : scale_over_temperature; }
};

// The chain rule through a softcap, whose slope differs from column to column.
template <typename Real, int columns>
__device__ __forceinline__ void multiply_by_slope(const Slope<Real>& slope, const Real (&z_s)[columns],
                                                  Real* gradient) {  // [columns]
  if (slope.softcap) {
#pragma unroll
    for (int v = 0; v < columns; ++v)
      gradient[v] *= transform_slope(z_s[v], slope.scale_over_temperature, slope.temperature_over_softcap);
  }
}

// What is constant along a row of the plain gradient.
template <typename Real>
struct RowGradient {
  ColumnCoefficients<Real> k;
  Real student_centre, teacher_centre;
  bool has_ratio;
  bool zero;  // exactly, whatever the logits hold

  __device__ __forceinline__ RowGradient(const RowStatistics<Real>& row, const Coefficients<Real>& of_row,
                                         const Slope<Real>& slope)
      : k(column_coefficients(row, of_row, slope.of_row())),
        student_centre(finite_centre(row.student_max)),
        teacher_centre(finite_centre(row.teacher_max)),
        has_ratio(of_row.b != 0),
        zero(unused(of_row)) {}
};

template <typename Real, int columns>
__device__ __forceinline__ void gradient_of(const RowGradient<Real>& row, const Real (&z_s)[columns],
                                            const Real (&z_t)[columns],
                                            Real* gradient) {  // [columns]
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    const Real ds = z_s[v] - row.student_centre, dt = z_t[v] - row.teacher_centre;
    const Real exp_ds = hardware::exp_of_nonpositive(ds), exp_dt = hardware::exp_of_nonpositive(dt);
    gradient[v] = row.has_ratio ? column_gradient<true, true>(row.k, ds, dt, exp_ds, exp_dt)
                                : column_gradient<false, true>(row.k, ds, dt, exp_ds, exp_dt);
  }
}

}  // namespace eopd::cuda
