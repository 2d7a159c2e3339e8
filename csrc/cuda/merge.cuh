// Merges the threads' partial rows into the row's: by warp shuffles, then shared memory, then the cluster's distributed
// shared memory, each time with the one merge that row_math.h has for these numbers.
//
// There is one cluster barrier per row. A CTA's partial row has two places, used in turn: whoever writes the one for the row after
// next has passed the next row's barrier, at which all CTAs have read this row's. Before leaving, a CTA waits until
// nobody reads its memory any more (leave).
#pragma once

#include "../row_math.h"
#include "hardware.cuh"

namespace eopd::cuda {

template <typename Numbers>
class Merge {
 public:
  struct Scratch {
    Numbers of_warp[1024 / hardware::warp_size];
    Numbers of_block[2];
  };

  explicit __device__ __forceinline__ Merge(char* memory) : scratch_(*reinterpret_cast<Scratch*>(memory)) {}

  // The row's numbers, the same bits in every thread of the cluster.
  __device__ __forceinline__ Numbers over_the_cluster(Numbers mine) {
    const int lane = hardware::thread_index() % hardware::warp_size;
    const int warp = hardware::thread_index() / hardware::warp_size;
    Numbers& of_block = scratch_.of_block[turn_];
    turn_ = 1 - turn_;
    over_the_warp(mine);
    if (lane == 0) scratch_.of_warp[warp] = mine;
    hardware::block_barrier();
    if (warp == 0) {
      Numbers part;
      if (lane < hardware::threads_per_block() / hardware::warp_size) part = scratch_.of_warp[lane];
      over_the_warp(part);
      if (lane == 0) of_block = part;
    }
    hardware::cluster_barrier();
    Numbers row;
    if (lane < hardware::cluster_size()) row = *hardware::in_shared_memory_of(lane, &of_block);
    over_the_warp(row);
    return hardware::shuffle_from_first(row);  // lanes may differ in the last bit, and with it in the gate
  }

  __device__ __forceinline__ void leave() { hardware::cluster_barrier(); }

 private:
  static __device__ __forceinline__ void over_the_warp(Numbers& row) {
#pragma unroll
    for (int mask = hardware::warp_size / 2; mask > 0; mask /= 2) merge(row, hardware::shuffle_xor(row, mask));
  }

  Scratch& scratch_;
  int turn_ = 0;
};

}  // namespace eopd::cuda
