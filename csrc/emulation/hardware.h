// The functions of cuda/hardware.cuh for a CPU, on fibres.
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../cpu/convert.h"
#include "counters.h"
#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace eopd::cuda::hardware {

using eopd::emulation::Barrier;
using eopd::emulation::Cluster;
using eopd::emulation::Cta;
using eopd::emulation::Fibre;
using eopd::emulation::counters;

struct alignas(16) Vector16 {
  uint32_t word[4];
};

constexpr int warp_size = emulation::warp_size;
constexpr bool has_clusters = true;

// ---- Threads, CTAs, clusters ---------------------------------------------------------------------------------------

inline Cluster& here() { return *Cluster::current(); }
inline int thread_index() { return here().fibre().thread; }
inline int threads_per_block() { return here().threads; }
inline void block_barrier() { here().wait(here().cta().barrier); }
inline int cluster_rank() { return here().fibre().rank; }
inline int cluster_size() { return here().size; }
inline void cluster_arrive() { here().arrive(); }
inline void cluster_release() { here().arrive(); }
inline void cluster_wait() { here().wait_for_arrivals(); }
inline int cluster_index() { return here().index; }
inline char* shared_memory() { return here().cta().shared.get(); }

template <typename Value>
Value* in_shared_memory_of(int rank, Value* mine) {
  const std::ptrdiff_t offset = reinterpret_cast<char*>(mine) - shared_memory();
  return reinterpret_cast<Value*>(here().ctas.at(rank).shared.get() + offset);
}

template <typename Value>
Value shuffle_xor(const Value& value, int mask) {
  emulation::Warp& warp = here().cta().warps[thread_index() / warp_size];
  static_assert(sizeof(Value) <= sizeof warp.shown[0]);
  std::memcpy(warp.shown[thread_index() % warp_size], &value, sizeof value);
  here().wait(warp.barrier);
  Value result;
  std::memcpy(&result, warp.shown[thread_index() % warp_size ^ mask], sizeof result);
  here().wait(warp.barrier);
  return result;
}

// ---- Global memory: counted, and aligned as the hardware wants it --------------------------------------------------

inline void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    throw std::runtime_error(std::string(what) + " of " + std::to_string(bytes) + " bytes at a misaligned address");
}

template <typename Word>
Word load_logit(const void* from) {
  check_alignment(from, sizeof(Word), "load");
  counters().logit_bytes += sizeof(Word);
  ++counters().scalar_loads;
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

inline Vector16 load_logits(const void* from) {
  check_alignment(from, 16, "load");
  counters().logit_bytes += 16;
  ++counters().vector_loads;
  Vector16 vector;
  std::memcpy(&vector, from, 16);
  return vector;
}

template <typename Word>
void store_gradient(void* to, Word word) {
  check_alignment(to, sizeof(Word), "store");
  counters().gradient_bytes += sizeof(Word);
  std::memcpy(to, &word, sizeof word);
}

inline void store_gradients(void* to, const Vector16& vector) {
  check_alignment(to, 16, "store");
  counters().gradient_bytes += 16;
  std::memcpy(to, &vector, 16);
}

template <typename Real>
Real load_number(const Real* from) {
  counters().number_bytes += sizeof(Real);
  return *from;
}

template <typename Real>
void store_number(Real* to, Real number) {
  counters().number_bytes += sizeof(Real);
  *to = number;
}

// ---- Asynchronous copies: they arrive at once or when they are waited for, as the seed has it -----------------------

inline void arrive(const emulation::Copy& copy) {
  std::memcpy(copy.to, copy.from, 16);
  counters().logit_bytes += 16;
  ++counters().vector_loads;
}

inline void begin_copy(Vector16* to, const void* from) {
  check_alignment(to, 16, "asynchronous copy");
  check_alignment(from, 16, "asynchronous copy");
  Fibre& fibre = here().fibre();
  const emulation::Copy copy{to, from, fibre.open_group};
  if (here().toss()) return arrive(copy);
  fibre.copies.push_back(copy);
}

inline void close_copies() { ++here().fibre().open_group; }

template <int groups>
void wait_for_copies() {
  Fibre& fibre = here().fibre();
  const auto under_way = [&](const emulation::Copy& copy) { return copy.group >= fibre.open_group - groups; };
  const auto first_left = std::find_if(fibre.copies.begin(), fibre.copies.end(), under_way);
  std::for_each(fibre.copies.begin(), first_left, arrive);
  fibre.copies.erase(fibre.copies.begin(), first_left);
}

// ---- Arithmetic, rounded where the hardware's is --------------------------------------------------------------------

inline float exp2_of(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
}
inline double exp2_of(double x) { return std::exp2(x); }

inline float exp_of_nonpositive(float x) { return exp2_of(x * 1.44269504f); }
inline double exp_of_nonpositive(double x) { return std::exp(x); }

inline float log_of_share(float x) { return std::log(x); }
inline double log_of_share(double x) { return std::log(x); }

inline float quotient(float x, float y) { return x / y; }
inline double quotient(double x, double y) { return x / y; }

inline float larger(float x, float y) { return std::fmax(x, y); }
inline double larger(double x, double y) { return std::fmax(x, y); }

inline float tanh_of(float x) { return std::tanh(x); }
inline double tanh_of(double x) { return std::tanh(x); }

inline float float_of_bits(uint32_t bits) { return cpu::bit_cast<float>(bits); }
inline uint32_t bits_of_float(float value) { return cpu::bit_cast<uint32_t>(value); }
inline double double_of_bits(uint64_t bits) { return cpu::bit_cast<double>(bits); }
inline uint64_t bits_of_double(double value) { return cpu::bit_cast<uint64_t>(value); }

inline float float_of_float16(uint16_t stored) { return cpu::float_of_float16(stored); }
inline uint16_t float16_of_float(float value) { return cpu::float16_of_float(value); }
inline uint16_t bfloat16_of_float(float value) { return cpu::bfloat16_of_float(value); }
inline uint32_t float16s_of_floats(float low, float high) {
  return float16_of_float(low) | uint32_t(float16_of_float(high)) << 16;
}
inline uint32_t bfloat16s_of_floats(float low, float high) {
  return bfloat16_of_float(low) | uint32_t(bfloat16_of_float(high)) << 16;
}

}  // namespace eopd::cuda::hardware
