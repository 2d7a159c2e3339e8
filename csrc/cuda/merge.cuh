// Merges the threads' partial rows into the row's: by warp shuffles, then shared memory, then the cluster's distributed
// shared memory, each time on common centres first, so that the rest are plain sums.
//
// Each CTA pushes its part into the others' memory, once, and reads its own after the cluster's barrier; whoever has passed
// that may leave. CTAs arrive at a first barrier as they begin, and wait there before they push: memory may only be written
// where its CTA has begun.
#pragma once

#include "bits.cuh"

namespace eopd::cuda {

// Sums of all lanes, the same bits in each of them: every step adds the same two numbers in both.
template <typename Sums>
__device__ __forceinline__ void sum_over_the_warp(Sums& sums) {
#pragma unroll
  for (int mask = hardware::warp_size / 2; mask > 0; mask /= 2) merge(sums, hardware::shuffle_xor(sums, mask));
}

template <typename Real>
__device__ __forceinline__ Real largest_of_the_warp(Real x) {
#pragma unroll
  for (int mask = hardware::warp_size / 2; mask > 0; mask /= 2) x = hardware::larger(x, hardware::shuffle_xor(x, mask));
  return x;
}

template <typename Real>
__device__ __forceinline__ void over_the_warp(MixtureStatistics<Real>& sums) {
  sum_over_the_warp(sums);
}

template <typename Real>
__device__ __forceinline__ void over_the_warp(RowInBits<Real>& row) {
  row.move(largest_of_the_warp(row.student_max), largest_of_the_warp(row.teacher_max));
  ColumnSums<Real> sums{row.student_sum,   row.teacher_sum,  row.teacher_self,
                        row.teacher_cross, row.student_self, row.student_cross};
  sum_over_the_warp(sums);
  row.student_sum = sums.student_sum, row.teacher_sum = sums.teacher_sum;
  row.teacher_self = sums.teacher_self, row.teacher_cross = sums.teacher_cross;
  row.student_self = sums.student_self, row.student_cross = sums.student_cross;
}

// `Numbers` are a thread's partial row; new ones are those of a thread without columns.
template <typename Numbers>
class Merge {
 public:
  static constexpr int largest_cluster = 16;
  struct Scratch {
    Numbers of_warp[1024 / hardware::warp_size];
    Numbers of_block[largest_cluster];
  };

  explicit __device__ __forceinline__ Merge(char* memory) : scratch_(*reinterpret_cast<Scratch*>(memory)) {
    hardware::cluster_arrive();
  }

  // The row's numbers, the same bits in every thread of the cluster.
  __device__ __forceinline__ Numbers over_the_cluster(Numbers mine) {
    const int lane = hardware::thread_index() % hardware::warp_size;
    const int warp = hardware::thread_index() / hardware::warp_size;
    over_the_warp(mine);
    if (lane == 0) scratch_.of_warp[warp] = mine;
    hardware::block_barrier();
    hardware::cluster_wait();
    if (warp == 0) {
      Numbers part;
      if (lane < hardware::threads_per_block() / hardware::warp_size) part = scratch_.of_warp[lane];
      over_the_warp(part);
      if (lane < hardware::cluster_size())
        *hardware::in_shared_memory_of(lane, scratch_.of_block + hardware::cluster_rank()) = part;
      hardware::cluster_release();
    } else {
      hardware::cluster_arrive();
    }
    hardware::cluster_wait();
    Numbers row;
    if (lane < hardware::cluster_size()) row = scratch_.of_block[lane];
    over_the_warp(row);
    return row;
  }

 private:
  Scratch& scratch_;
};

}  // namespace eopd::cuda
