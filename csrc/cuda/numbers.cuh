// Loads and stores of a row's numbers: its statistics, its mixture's, its coefficients.
#pragma once

#include "../row_math.h"
#include "hardware.cuh"

namespace eopd::cuda {

// The gate of a row. A bare number would stay in a register: the kernel that keeps the teacher in registers then spilled 24
// bytes on sm_100 and 16 on sm_120.
template <typename Real>
struct Gate {
  Real threshold;

  __device__ __forceinline__ Real operator()(const RowStatistics<Real>& row) const {
    return open_gate(row, threshold);
  }
};

template <typename Real>
__device__ __forceinline__ void store_statistics(Real* statistics,  // [n, 8]
                                                 int64_t row, const RowStatistics<Real>& numbers) {
  Real* to = statistics + 8 * row;
  hardware::store_number(to, numbers.student_max);
  hardware::store_number(to + 1, numbers.student_sum);
  hardware::store_number(to + 2, numbers.teacher_max);
  hardware::store_number(to + 3, numbers.teacher_sum);
  hardware::store_number(to + 4, numbers.teacher_self);
  hardware::store_number(to + 5, numbers.teacher_cross);
  hardware::store_number(to + 6, numbers.student_self);
  hardware::store_number(to + 7, numbers.student_cross);
}

template <typename Real>
__device__ __forceinline__ void store_mixture(Real* mixture,  // [n, 4]
                                              int64_t row, const MixtureStatistics<Real>& numbers) {
  Real* to = mixture + 4 * row;
  hardware::store_number(to, numbers.forward_kl);
  hardware::store_number(to + 1, numbers.reverse_kl);
  hardware::store_number(to + 2, numbers.forward_share);
  hardware::store_number(to + 3, numbers.reverse_share);
}

template <typename Real>
__device__ __forceinline__ Coefficients<Real> load_coefficients(const Real* a,  // [n]
                                                                   const Real* b,  // [n]
                                                                   const Real* c,  // [n]
                                                                   int64_t row) {
  return {hardware::load_number(a + row), hardware::load_number(b + row), hardware::load_number(c + row)};
}

template <typename Real>
__device__ __forceinline__ RowStatistics<Real> load_statistics(const Real* statistics,  // [n, 8]
                                                               int64_t row) {
  const Real* from = statistics + 8 * row;
  RowStatistics<Real> numbers;
  numbers.student_max = hardware::load_number(from);
  numbers.student_sum = hardware::load_number(from + 1);
  numbers.teacher_max = hardware::load_number(from + 2);
  numbers.teacher_sum = hardware::load_number(from + 3);
  numbers.teacher_self = hardware::load_number(from + 4);
  numbers.teacher_cross = hardware::load_number(from + 5);
  numbers.student_self = hardware::load_number(from + 6);
  numbers.student_cross = hardware::load_number(from + 7);
  return numbers;
}

}  // namespace eopd::cuda
