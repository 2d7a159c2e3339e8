// Blocks of columns between the dtype of a tensor and the type computed in. Plain loops over plain bits: the compiler
// vectorises them for the instruction set at hand.
#pragma once

#include "kernels.h"
#include "../row_math.h"
#include "vector.h"

namespace eopd::cpu {
namespace {

inline float float_of_bfloat16(uint16_t stored) { return bit_cast<float>(uint32_t(stored) << 16); }

// Rounds to nearest, ties to even; a NaN keeps its sign and becomes quiet.
inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

// Widens a float16. Multiplying with 2^112 moves the exponent, and normalises subnormals on the way.
inline float float_of_float16(uint16_t stored) {
  const uint32_t bits = stored;
  const uint32_t moved = bit_cast<uint32_t>(bit_cast<float>((bits & 0x7fff) << 13) * 0x1p112f);
  const uint32_t not_finite = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return bit_cast<float>(moved | not_finite | ((bits & 0x8000) << 16));
}

// Rounds to a float16: above 2^-14 by its bits, below by adding 0.5, whose last place is that of a float16 subnormal.
inline uint16_t float16_of_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  return uint16_t(result | ((bits >> 16) & 0x8000));
}

// How each dtype is stored. A float64 is rounded to float on its way to 16 bits: twice rounded, which no 16-bit gradient
// can tell.
template <DType dtype>
struct Storage;
template <>
struct Storage<DType::float32> {
  using Scalar = float;
  static float widen(float stored) { return stored; }
  static float narrow(float value) { return value; }
};
template <>
struct Storage<DType::float64> {
  using Scalar = double;
  static double widen(double stored) { return stored; }
  static double narrow(double value) { return value; }
};
template <>
struct Storage<DType::bfloat16> {
  using Scalar = uint16_t;
  static float widen(uint16_t stored) { return float_of_bfloat16(stored); }
  static uint16_t narrow(float value) { return bfloat16_of_float(value); }
};
template <>
struct Storage<DType::float16> {
  using Scalar = uint16_t;
  static float widen(uint16_t stored) { return float_of_float16(stored); }
  static uint16_t narrow(float value) { return float16_of_float(value); }
};

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The address of an element, computed in bytes, because it need not be aligned.
inline char* element(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.dtype);
}

template <DType dtype, typename Real>
void widen_all(const char* from, int count, Real* to) {
  using Scalar = typename Storage<dtype>::Scalar;
  for (int v = 0; v < count; ++v) {
    Scalar stored;
    std::memcpy(&stored, from + v * sizeof stored, sizeof stored);
    to[v] = static_cast<Real>(Storage<dtype>::widen(stored));
  }
}

template <DType dtype, typename Real>
void narrow_all(const Real* from, int count, char* to) {
  using Scalar = typename Storage<dtype>::Scalar;
  for (int v = 0; v < count; ++v) {
    const Scalar stored = Storage<dtype>::narrow(static_cast<decltype(Storage<dtype>::widen(Scalar{}))>(from[v]));
    std::memcpy(to + v * sizeof stored, &stored, sizeof stored);
  }
}

template <typename Real>
void widen_block(DType dtype, const char* from, int count, Real* to) {
  switch (dtype) {
    case DType::float32: return widen_all<DType::float32>(from, count, to);
    case DType::bfloat16: return widen_all<DType::bfloat16>(from, count, to);
    case DType::float16: return widen_all<DType::float16>(from, count, to);
    case DType::float64: return widen_all<DType::float64>(from, count, to);
  }
}

template <typename Real>
void narrow_block(DType dtype, const Real* from, int count, char* to) {
  switch (dtype) {
    case DType::float32: return narrow_all<DType::float32>(from, count, to);
    case DType::bfloat16: return narrow_all<DType::bfloat16>(from, count, to);
    case DType::float16: return narrow_all<DType::float16>(from, count, to);
    case DType::float64: return narrow_all<DType::float64>(from, count, to);
  }
}

// Calls function(Value, column) for all columns, a register at a time and the ragged end one by one.
template <typename Real, typename Function>
inline void for_columns(int count, Function function) {
  int v = 0;
  for (; v + lanes<Real> <= count; v += lanes<Real>) function(Vector<Real>{}, v);
  for (; v < count; ++v) function(Real{}, v);
}

// Transforms logits in place: z from x.
template <typename Real>
void transform_block(const Transform& transform, int count, Real* block) {
  if (transform.softcap == 0) {
    const Real factor = static_cast<Real>(transform.scale / transform.temperature);
    for_columns<Real>(count, [&](auto kind, int v) {
      using Value = decltype(kind);
      store(block + v, load<Value>(block + v) * factor);
    });
  } else {
    const Real inner = static_cast<Real>(transform.scale / transform.softcap);
    const Real outer = static_cast<Real>(transform.softcap / transform.temperature);
    for_columns<Real>(count, [&](auto kind, int v) {
      using Value = decltype(kind);
      store(block + v, tanh_of<Value>(load<Value>(block + v) * inner) * outer);
    });
  }
}

// The chain rule through transform_block of a softcap, whose slope differs from column to column.
template <typename Real>
void multiply_by_slope(const Transform& transform, int count, const Real* z, Real* gradient) {
  const Real slope = static_cast<Real>(transform.scale / transform.temperature);
  const Real inverse = static_cast<Real>(transform.temperature / transform.softcap);
  for_columns<Real>(count, [&](auto kind, int v) {
    using Value = decltype(kind);
    store(gradient + v, load<Value>(gradient + v) * transform_slope(load<Value>(z + v), slope, inverse));
  });
}

}  // namespace
}  // namespace eopd::cpu
