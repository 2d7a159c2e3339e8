// A row's weighted sums in bits, the unit in which a GPU takes exponentials: a logit's distance from its maximum is
// log2(e) times what it is in nats. The formulas stay what they are (row_math.h). What leaves a kernel is in nats.
#pragma once

#include "../row_math.h"
#include "hardware.cuh"

namespace eopd::cuda {

constexpr double bits_per_nat = 1.4426950408889634, nats_per_bit = 0.69314718055994531;

template <typename Real>
__device__ __forceinline__ Real bits_of(Real nats) {
  return Real(bits_per_nat) * nats;
}

// Statistics whose weighted sums are in bits; the maxima are the logits' own, in nats.
template <typename Real>
struct RowInBits : RowStatistics<Real> {
  // The maximum of what has no columns: unlike -inf it can be subtracted from -inf.
  static constexpr Real none = std::numeric_limits<Real>::lowest();

  __device__ __forceinline__ RowInBits() { this->student_max = this->teacher_max = none; }

  __device__ __forceinline__ void move(Real student_max, Real teacher_max) {
    this->student_max = bits_of(this->student_max - student_max);
    this->teacher_max = bits_of(this->teacher_max - teacher_max);
    recentre<Real>(*this, 0, 0, [](Real distance) { return hardware::exp2_of(distance); });
    this->student_max = student_max, this->teacher_max = teacher_max;
  }

  __device__ __forceinline__ RowStatistics<Real> in_nats() const {
    constexpr Real minus_infinity = -std::numeric_limits<Real>::infinity(), unit = Real(nats_per_bit);
    return {this->student_max == none ? minus_infinity : this->student_max, this->student_sum,
            this->teacher_max == none ? minus_infinity : this->teacher_max, this->teacher_sum,
            unit * this->teacher_self, unit * this->teacher_cross,
            unit * this->student_self, unit * this->student_cross};
  }
};

}  // namespace eopd::cuda
