// A thread's arithmetic on a few columns in registers: docs/math.md, "One pass" and "One gradient form".
//
#pragma once

#include <type_traits>

#include "bits.cuh"

namespace eopd::cuda {

// A transform in the factors it takes per logit: z = outer tanh(inner x) with a softcap, inner x without.
template <typename Real>
struct LogitTransform {
  Real inner, outer;
  bool softcap, identity;

  __device__ __forceinline__ Real operator()(Real x) const {
    return softcap ? outer * hardware::tanh_of(inner * x) : inner * x;
  }
};

template <typename Real>
struct LogitTransforms {
  LogitTransform<Real> student, teacher;

  // Both sides' x become z, in a branch that the usual launch passes by.
  template <int columns>
  __device__ __forceinline__ void operator()(Real (&x_s)[columns], Real (&x_t)[columns]) const {
    if (student.identity && teacher.identity) return;
#pragma unroll
    for (int v = 0; v < columns; ++v) x_s[v] = student(x_s[v]), x_t[v] = teacher(x_t[v]);
  }
};

// A few columns in bits from their centres.
template <typename Real, int columns>
struct Distances {
  Real s[columns], t[columns];

  __device__ __forceinline__ Distances(const Real (&z_s)[columns], const Real (&z_t)[columns], Real student_centre,
                                       Real teacher_centre) {
#pragma unroll
    for (int v = 0; v < columns; ++v) s[v] = bits_of(z_s[v] - student_centre), t[v] = bits_of(z_t[v] - teacher_centre);
  }
};

// The sums of these columns alone.
template <bool guarded, typename Real, int columns>
__device__ __forceinline__ ColumnSums<Real> sums_of(const Distances<Real, columns>& from) {
  ColumnSums<Real> sums;
#pragma unroll
  for (int v = 0; v < columns; ++v)
    add_columns<guarded>(sums, from.s[v], from.t[v], hardware::exp2_of(from.s[v]), hardware::exp2_of(from.t[v]));
  return sums;
}

// A thread's partial row. Its centres may lie below its maxima while it grows: a warp in which one thread moves them waits
// for it, and under exact ones that is nearly every group.
template <typename Real>
struct GrowingRow {
  RowInBits<Real> row;
  Real student_max = RowInBits<Real>::none, teacher_max = RowInBits<Real>::none;

  // Both sides move together, so that the centres of a student near its teacher stay as near.
  __device__ __forceinline__ void move() { row.move(student_max, teacher_max); }
  __device__ __forceinline__ bool centres_will_do() const {
    constexpr Real most_nats_above = 5;
    return student_max - row.student_max <= most_nats_above && teacher_max - row.teacher_max <= most_nats_above;
  }
};

// Adds a group of columns to a thread's partial row. The sums are taken without guards first: -inf columns and NaN leave
// traces in them, and such a group is done again. Maxima pass over NaN, the sums do not.
template <typename Real, int columns>
__device__ __forceinline__ void add_group(GrowingRow<Real>& sums, const Real (&z_s)[columns],
                                          const Real (&z_t)[columns]) {
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    sums.student_max = hardware::larger(sums.student_max, z_s[v]);
    sums.teacher_max = hardware::larger(sums.teacher_max, z_t[v]);
  }
  if (!sums.centres_will_do()) sums.move();
  const Distances<Real, columns> from(z_s, z_t, sums.row.student_max, sums.row.teacher_max);
  ColumnSums<Real> here = sums_of<false>(from);
  const Real trace = here.teacher_self + here.teacher_cross + here.student_self + here.student_cross;
  if (!(trace - trace == 0)) here = sums_of<true>(from);
  add_sums(sums.row, here);
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
__device__ __forceinline__ void multiply_bz_slope(const Slope<Real>& slope, const Real (&z_s)[columns],
                                                  Real* gradient) {  // [columns]
  if (slope.softcap) {
#pragma unroll
    for (int v = 0; v < columns; ++v)
      gradient[v] *=
          transform_slope(z_s[v], slope.scale_over_temperature, slope.temperature_over_softcap);
  }
}

// What is constant along a row of the plain gradient.
template <typename Real>
struct RowGradient {
  ColumnCoefficients<Real> k;  // of a log-ratio in bits
  Real student_centre, teacher_centre;
  bool zero;  // exactly, whatever the logits hold

  __device__ __forceinline__ RowGradient(const RowStatistics<Real>& row, const Coefficients<Real>& of_row,
                                         const Slope<Real>& slope)
      : k(column_coefficients(row, of_row, slope.of_row())),
        student_centre(finite_centre(row.student_max)),
        teacher_centre(finite_centre(row.teacher_max)),
        zero(unused(of_row)) {
    k.ratio *= Real(nats_per_bit);
  }
};

// Writes the gradient of columns; without guards first, as add_group does.
template <typename Real, int columns>
__device__ __forceinline__ void gradient_of(const RowGradient<Real>& row, const Real (&z_s)[columns],
                                            const Real (&z_t)[columns],
                                            Real* gradient) {  // [columns]
  const Distances<Real, columns> from(z_s, z_t, row.student_centre, row.teacher_centre);
  Real exp_s[columns], exp_t[columns], trace = 0;
#pragma unroll
  for (int v = 0; v < columns; ++v) {
    exp_s[v] = hardware::exp2_of(from.s[v]), exp_t[v] = hardware::exp2_of(from.t[v]);
    gradient[v] = column_gradient<true, true, false>(row.k, from.s[v], from.t[v], exp_s[v], exp_t[v]);
    trace = v == 0 ? gradient[0] : trace + gradient[v];
  }
  if (trace - trace == 0) return;
#pragma unroll
  for (int v = 0; v < columns; ++v)
    gradient[v] = row.k.ratio != 0 ? column_gradient<true, true>(row.k, from.s[v], from.t[v], exp_s[v], exp_t[v])
                                : column_gradient<false, true>(row.k, from.s[v], from.t[v], exp_s[v], exp_t[v]);
}

}  // namespace eopd::cuda
