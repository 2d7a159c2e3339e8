// Everything that only the hardware can do, in one place: emulation/hardware.h has the same functions for a CPU.
#pragma once

#ifdef EOPD_EMULATION
#include "../emulation/hardware.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace eopd::cuda::hardware {

struct alignas(16) Vector16 {
  uint32_t word[4];
};

constexpr int warp_size = 32;

// ---- Threads, CTAs, clusters (before sm_90 a CTA is its own cluster) -----------------------------------------------

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int threads_per_block() { return blockDim.x; }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
__device__ __forceinline__ int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
// The cluster's barrier in two halves. What a thread wrote before it released is there for all who have waited; an
// arrival alone shows nothing, and needs no fence.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_release() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <typename Value>
__device__ __forceinline__ Value* in_shared_memory_of(int rank, Value* mine) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
constexpr bool has_clusters = false;
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_release() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <typename Value>
__device__ __forceinline__ Value* in_shared_memory_of(int, Value* mine) {
  return mine;
}
#endif

__device__ __forceinline__ int cluster_index() { return blockIdx.x / cluster_size(); }

// Dynamic shared memory, of as many bytes as the launch asked for.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The value of the lane whose index differs in the bits of `mask`; any type of whole words.
template <typename Value>
__device__ __forceinline__ Value shuffle_xor(const Value& value, int mask) {
  static_assert(sizeof(Value) % 4 == 0);
  Value result;
  const auto* from = reinterpret_cast<const uint32_t*>(&value);
  auto* to = reinterpret_cast<uint32_t*>(&result);
#pragma unroll
  for (int i = 0; i < int(sizeof(Value) / 4); ++i) to[i] = __shfl_xor_sync(0xffffffffu, from[i], mask);
  return result;
}

// ---- Global memory -------------------------------------------------------------------------------------------------

// Logits and gradients: read once or for the last time, written for somebody else, hence first to leave the caches.
template <typename Word>
__device__ __forceinline__ Word load_logit(const void* from) {
  return __ldcs(static_cast<const Word*>(from));
}

__device__ __forceinline__ Vector16 load_logits(const void* from) {
  const uint4 vector = __ldcs(static_cast<const uint4*>(from));
  return {{vector.x, vector.y, vector.z, vector.w}};
}

template <typename Word>
__device__ __forceinline__ void store_gradient(void* to, Word word) {
  __stcs(static_cast<Word*>(to), word);
}

__device__ __forceinline__ void store_gradients(void* to, const Vector16& vector) {
  __stcs(static_cast<uint4*>(to), make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]));
}

// The numbers of rows: statistics, mixtures, gates, weights, coefficients.
template <typename Real>
__device__ __forceinline__ Real load_number(const Real* from) {
  return *from;
}

template <typename Real>
__device__ __forceinline__ void store_number(Real* to, Real number) {
  *to = number;
}

// ---- Asynchronous copies: 16 aligned bytes of logits into shared memory, waited for by the thread that began them ----

__device__ __forceinline__ void begin_copy(Vector16* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}

// Closes the group of the copies begun since the last one was closed.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `groups` groups are under way.
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

// 2^x in one instruction, within 2^-22 of it. Results below 2^-126 are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double exp2_of(double x) { return ::exp2(x); }

// e^x for x <= 0 in two instructions. The product's rounding makes a relative error of 2^-25 |x| log2 e: 5e-7 of a column whose mass is
// e^-10 of the largest.
__device__ __forceinline__ float exp_of_nonpositive(float x) { return exp2_of(x * 1.44269504f); }
__device__ __forceinline__ double exp_of_nonpositive(double x) { return ::exp(x); }

// log x for x in (0, 1]. Not the hardware's own: it is off by 2^-22 near 1, where the result is a divergence.
__device__ __forceinline__ float log_of_share(float x) { return ::logf(x); }
__device__ __forceinline__ double log_of_share(double x) { return ::log(x); }

// x/y in two instructions, within 2 ulp for y in [2^-126, 2^126], without the branch of a division. Less than 2^-126 is 0.
__device__ __forceinline__ float quotient(float x, float y) {
  float result;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }

// The larger of two numbers; where one is NaN, the other.
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

__device__ __forceinline__ float tanh_of(float x) { return ::tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return ::tanh(x); }

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }
__device__ __forceinline__ double double_of_bits(uint64_t bits) { return __longlong_as_double(bits); }
__device__ __forceinline__ uint64_t bits_of_double(double value) { return __double_as_longlong(value); }

__device__ __forceinline__ float float_of_float16(uint16_t stored) { return __half2float(__ushort_as_half(stored)); }
__device__ __forceinline__ uint16_t float16_of_float(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ uint16_t bfloat16_of_float(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Two numbers in a word, the first in its low half.
__device__ __forceinline__ uint32_t float16s_of_floats(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t bfloat16s_of_floats(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace eopd::cuda::hardware
#endif
