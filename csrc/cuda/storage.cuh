// Logits as they lie in memory: groups of neighbouring columns of one row, 16 bytes at a time where the row is aligned.
//
// A kernel is compiled for the widths of its two sides, not for their dtypes: bfloat16 and float16 are told apart at run
// time, by a branch that a whole launch takes alike. That makes four kernels of nine pairs.
#pragma once

#include "../problem.h"
#include "hardware.cuh"

namespace eopd::cuda {

using hardware::Vector16;

// Conversions of a 16-bit number of either format.
__device__ __forceinline__ float widened(uint32_t stored, DType dtype) {
  return dtype == DType::bfloat16 ? hardware::float_of_bits(stored << 16) : hardware::float_of_float16(uint16_t(stored));
}

__device__ __forceinline__ uint16_t narrowed(float value, DType dtype) {
  return dtype == DType::bfloat16 ? hardware::bfloat16_of_float(value) : hardware::float16_of_float(value);
}

__device__ __forceinline__ int bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Loads one logit of any dtype.
template <typename Real>
__device__ __forceinline__ Real load_scalar(const char* row, int column, DType dtype) {
  const char* from = row + int64_t(column) * bytes_of(dtype);
  if (dtype == DType::float32) return Real(hardware::float_of_bits(hardware::load_logit<uint32_t>(from)));
  if (dtype == DType::float64) return Real(hardware::double_of_bits(hardware::load_logit<uint64_t>(from)));
  return Real(widened(hardware::load_logit<uint16_t>(from), dtype));
}

// Stores one column of the gradient. A double goes through float on its way to 16 bits, as on the CPU.
template <typename Real>
__device__ __forceinline__ void store_scalar(char* row, int column, DType dtype, Real value) {
  char* to = row + int64_t(column) * bytes_of(dtype);
  if (dtype == DType::float32) return hardware::store_gradient(to, hardware::bits_of_float(float(value)));
  if (dtype == DType::float64) return hardware::store_gradient(to, hardware::bits_of_double(double(value)));
  hardware::store_gradient(to, narrowed(float(value), dtype));
}

template <int count>
struct Vectors {
  Vector16 vector[count];
  __device__ __forceinline__ uint32_t word(int i) const { return vector[i / 4].word[i % 4]; }
};

// The storage of float32.
struct Bits32 {
  using Real = float;
  static constexpr int bytes = 4;
  template <int columns>
  using Group = Vectors<columns / 4>;

  template <int columns, int count>
  static __device__ __forceinline__ void widen(const Vectors<columns>& group, int first, DType, float (&x)[count]) {
#pragma unroll
    for (int v = 0; v < count; ++v) x[v] = hardware::float_of_bits(group.word(first + v));
  }

  // Loads a group of a row that is not aligned.
  template <int columns>
  static __device__ __forceinline__ Group<columns> gather(const char* row, int column, DType) {
    Group<columns> group;
#pragma unroll
    for (int v = 0; v < columns; ++v)
      group.vector[v / 4].word[v % 4] = hardware::load_logit<uint32_t>(row + int64_t(column + v) * bytes);
    return group;
  }
};

// The storage of bfloat16 or float16.
struct Bits16 {
  using Real = float;
  static constexpr int bytes = 2;
  template <int columns>
  using Group = Vectors<columns / 8>;

  template <int columns, int count>
  static __device__ __forceinline__ void widen(const Vectors<columns>& group, int first, DType dtype,
                                               float (&x)[count]) {
    if (dtype == DType::bfloat16) {
#pragma unroll
      for (int v = 0; v < count; v += 2) {
        const uint32_t pair = group.word((first + v) / 2);
        x[v] = hardware::float_of_bits(pair << 16);
        x[v + 1] = hardware::float_of_bits(pair & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int v = 0; v < count; v += 2) {
        const uint32_t pair = group.word((first + v) / 2);
        x[v] = hardware::float_of_float16(uint16_t(pair));
        x[v + 1] = hardware::float_of_float16(uint16_t(pair >> 16));
      }
    }
  }

  template <int columns>
  static __device__ __forceinline__ Group<columns> gather(const char* row, int column, DType) {
    Group<columns> group;
#pragma unroll
    for (int v = 0; v < columns; v += 2) {
      const char* from = row + int64_t(column + v) * bytes;
      const uint32_t low = hardware::load_logit<uint16_t>(from), high = hardware::load_logit<uint16_t>(from + bytes);
      group.vector[v / 8].word[v / 2 % 4] = low | high << 16;
    }
    return group;
  }
};

// The storage of any dtype, widened to double as it is loaded, one column at a time: float64 is for checks, not for speed.
struct AnyBits {
  using Real = double;
  static constexpr int bytes = 16;  // of shared memory per column
  template <int columns>
  using Group = Vectors<columns>;

  template <int columns, int count>
  static __device__ __forceinline__ void widen(const Vectors<columns>& group, int first, DType, double (&x)[count]) {
#pragma unroll
    for (int v = 0; v < count; ++v)
      x[v] = hardware::double_of_bits(uint64_t(group.word(4 * (first + v) + 1)) << 32 | group.word(4 * (first + v)));
  }

  template <int columns>
  static __device__ __forceinline__ Group<columns> gather(const char* row, int column, DType dtype) {
    Group<columns> group{};
#pragma unroll
    for (int v = 0; v < columns; ++v) {
      const uint64_t bits = hardware::bits_of_double(load_scalar<double>(row, column + v, dtype));
      group.vector[v].word[0] = uint32_t(bits);
      group.vector[v].word[1] = uint32_t(bits >> 32);
    }
    return group;
  }
};

// Two sides that are visited together. A group is as many columns as the narrower side has in 16 bytes.
template <typename StudentBits, typename TeacherBits>
struct Sides {
  using Student = StudentBits;
  using Teacher = TeacherBits;
  using Real = typename Student::Real;
  static constexpr int columns = 16 / (Student::bytes < Teacher::bytes ? Student::bytes : Teacher::bytes);
  // How many columns are in registers as numbers at a time. All 8 of 16-bit logits at once spilled with 80 registers.
  static constexpr int step = columns < 4 ? columns : 4;
  using StudentGroup = typename Student::template Group<columns>;
  using TeacherGroup = typename Teacher::template Group<columns>;
  static constexpr int student_vectors = sizeof(StudentGroup) / 16, teacher_vectors = sizeof(TeacherGroup) / 16;
};

// Stores a group of gradients in their dtype; 8 bytes at once where float32 logits have a 16-bit gradient.
template <typename Real, int columns>
__device__ __forceinline__ void store_group(char* row, int column, DType dtype, bool aligned,
                                            const Real (&gradient)[columns]) {
  if constexpr (columns >= 4) {
    if (aligned && dtype == DType::float32) {
#pragma unroll
      for (int v = 0; v < columns; v += 4) {
        const Vector16 vector{{hardware::bits_of_float(gradient[v]), hardware::bits_of_float(gradient[v + 1]),
                               hardware::bits_of_float(gradient[v + 2]), hardware::bits_of_float(gradient[v + 3])}};
        hardware::store_gradients(row + int64_t(column + v) * 4, vector);
      }
      return;
    }
    if (aligned) {
      uint32_t pair[columns / 2];
#pragma unroll
      for (int v = 0; v < columns; v += 2)
        pair[v / 2] = dtype == DType::bfloat16 ? hardware::bfloat16s_of_floats(gradient[v], gradient[v + 1])
                                               : hardware::float16s_of_floats(gradient[v], gradient[v + 1]);
      char* to = row + int64_t(column) * 2;
      if constexpr (columns == 8) {
        hardware::store_gradients(to, {{pair[0], pair[1], pair[2], pair[3]}});
      } else {
        hardware::store_gradient(to, uint64_t(pair[1]) << 32 | pair[0]);
      }
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < columns; ++v) store_scalar(row, column + v, dtype, gradient[v]);
}

}  // namespace eopd::cuda
