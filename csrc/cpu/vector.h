// SIMD on GCC's vector extensions: the compiler flags choose the width, every function also takes the plain scalar, so that
// the ragged end of a row runs through the same code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define EOPD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define EOPD_VECTOR_BYTES 32
#else
#define EOPD_VECTOR_BYTES 16
#endif

namespace eopd::cpu {
namespace {

template <typename Scalar, int bytes>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(bytes)));
};

// A register of Real, and one of as many lanes of another type.
template <typename Real>
constexpr int lanes = EOPD_VECTOR_BYTES / sizeof(Real);
template <typename Scalar, int count>
using Lanes = typename VectorOf<Scalar, count * sizeof(Scalar)>::type;
template <typename Real>
using Vector = Lanes<Real, lanes<Real>>;

template <typename Value>
struct Traits;  // the scalar in a value, how many of them, and unsigned integers of the same shape
template <>
struct Traits<float> {
  using Scalar = float;
  using Integer = uint32_t;
  static constexpr int count = 1;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Integer = uint64_t;
  static constexpr int count = 1;
};
template <>
struct Traits<Vector<float>> {
  using Scalar = float;
  using Integer = Vector<uint32_t>;
  static constexpr int count = lanes<float>;
};
template <>
struct Traits<Vector<double>> {
  using Scalar = double;
  using Integer = Vector<uint64_t>;
  static constexpr int count = lanes<double>;
};
template <typename Value>
using ScalarOf = typename Traits<Value>::Scalar;
template <typename Value>
using IntegerOf = typename Traits<Value>::Integer;

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Loads and stores of any alignment.
template <typename Value, typename Scalar>
inline Value load(const Scalar* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename Value, typename Scalar>
inline void store(Scalar* to, Value value) {
  std::memcpy(to, &value, sizeof value);
}

// Stores past the caches, to a multiple of a vector's size; an ordinary store where there is no such instruction.
template <typename Value, typename Scalar>
inline void store_past_caches(Scalar* to, Value value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Value) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(value));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Value) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(value));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(Value) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(value));
#endif
  store(to, value);
}

// Makes the thread's streamed stores visible to the others.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// x > y ? x : y, therefore y where either is NaN. With a constant x GCC turns the comparison around and then misses the
// instruction, hence the intrinsics; the masked ones because the others warn.
template <typename Value>
inline Value larger(Value x, Value y) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Value, Vector<float>>) return _mm512_maskz_max_ps(0xffff, x, y);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Value, Vector<float>>) return _mm256_max_ps(x, y);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<Value, Vector<float>>) return _mm_max_ps(x, y);
#endif
  return x > y ? x : y;
}

template <typename Value>
inline double sum_of_lanes(Value value) {
  ScalarOf<Value> lane[Traits<Value>::count];
  std::memcpy(lane, &value, sizeof value);
  double sum = 0;
  for (auto x : lane) sum += x;
  return sum;
}

template <typename Value>
inline ScalarOf<Value> largest_lane(Value value) {
  ScalarOf<Value> lane[Traits<Value>::count];
  std::memcpy(lane, &value, sizeof value);
  auto largest = lane[0];
  for (auto x : lane) largest = larger(x, largest);
  return largest;
}

template <typename Function>
inline double each_lane(double value, Function function) {
  return function(value);
}

template <typename Function>
inline Vector<double> each_lane(Vector<double> value, Function function) {
  for (int i = 0; i < lanes<double>; ++i) value[i] = function(value[i]);
  return value;
}

// e^x for x <= 0, within 2 ulp down to x = -20 and 4 ulp below; 0 below 2^-126.5 and for -inf, NaN for NaN.
//
// x = n ln 2 + r, e^r by a minimax polynomial of degree 5 (1e-7), times 2^n put together from its bits. The clamp makes
// n = -127 of everything small, whose bits are those of 0: no comparison is needed. ln 2 is one float, 2e-9 off: what that
// costs grows with n, where e^x no longer counts; it is in two parts where n ln 2 would be rounded. Statistics of 16 columns
// in the caches, AVX-512 / AVX2: 7.5 / 9.1 ns; with two parts 8.0 / 10.0, with degree 6 as well 8.6 / 10.8.
template <typename Value>
inline Value exp_of_nonpositive(Value x) {
  if constexpr (std::is_same_v<ScalarOf<Value>, double>) {
    return each_lane(x, [](double lane) { return std::exp(lane); });
  } else {
    using Integer = IntegerOf<Value>;
    constexpr float magic = 0x1.8p23f + 127;  // adding it rounds to an integer and leaves n + 127 in the low bits
    x = larger(Value{} - 88.0f, x);
    const Value shifted = x * 0x1.715476p+0f + magic;
    const Value n = shifted - magic;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const Value r = x - n * 0x1.62e43p-1f;
#else
    const Value r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
#endif
    Value e = r * 0x1.10627ap-7f + 0x1.572a06p-5f;
    e = e * r + 0x1.5557aep-3f;
    e = e * r + 0x1.fffdfcp-2f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * bit_cast<Value>(bit_cast<Integer>(shifted) << 23);
  }
}

// log x for x in [2^-126, 2], within 1 ulp; of NaN it makes some number.
//
// x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), so that n = 0 on both sides of 1, where the result is small. log(1 + f) =
// f - f^2/2 + f^3 P(f), P of degree 7 with the least relative error of the whole (6e-9).
template <typename Value>
inline Value log_of_share(Value x) {
  if constexpr (std::is_same_v<ScalarOf<Value>, double>) {
    return each_lane(x, [](double lane) { return std::log(lane); });
  } else {
    using Integer = IntegerOf<Value>;
    constexpr uint32_t root = 0x3f3504f3, one = 0x3f800000;  // bits of sqrt(1/2) and 1
    const Integer moved = bit_cast<Integer>(x) + (one - root);
    const Value n = bit_cast<Value>((moved >> 23) | 0x4b000000) - (0x1p23f + 127);
    const Value f = bit_cast<Value>((moved & 0x7fffff) + root) - 1.0f;
    Value e = f * -0x1.38b4ccp-4f + 0x1.055b46p-3f;
    e = e * f - 0x1.0d8552p-3f;
    e = e * f + 0x1.22da22p-3f;
    e = e * f - 0x1.547244p-3f;
    e = e * f + 0x1.99a008p-3f;
    e = e * f - 0x1.000228p-2f;
    e = e * f + 0x1.555554p-2f;
    const Value square = f * f;
    const Value rest = square * (f * e - 0.5f) + n * 0x1.7f7d1cp-20f;
    return n * 0x1.62e4p-1f + (f + rest);
  }
}

// tanh x, by a polynomial near 0, where (1 - e)/(1 + e) cancels.
template <typename Value>
inline Value tanh_of(Value x) {
  if constexpr (std::is_same_v<ScalarOf<Value>, double>) {
    return each_lane(x, [](double lane) { return std::tanh(lane); });
  } else {
    const Value magnitude = x < Value{} ? -x : x;
    const Value e = exp_of_nonpositive(magnitude * -2.0f);
    const Value large = (1.0f - e) / (1.0f + e);
    const Value square = x * x;
    Value small = square * -0x1.69711ap-8f + 0x1.4f5ef8p-6f;
    small = small * square - 0x1.b7cff2p-5f;
    small = small * square + 0x1.1103f2p-3f;
    small = small * square - 0x1.555524p-2f;
    small = small * square * x + x;
    return magnitude < Value{} + 0.625f ? small : (x < Value{} ? -large : large);
  }
}

}  // namespace
}  // namespace eopd::cpu
