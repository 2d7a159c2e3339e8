// The three plain row functions: docs/math.md, "One pass" and "One gradient form"; docs/cuda.md has a picture.
//
// A cluster takes a row: the hardware hands them out as others end, more evenly than any fixed share of rows.
// row_loss_and_gradient is one kernel for every place that a row can be kept in between its visits: kept in shared memory
// or registers, each logit is read once.
#pragma once

#include "merge.cuh"
#include "numbers.cuh"
#include "visits.cuh"

namespace eopd::cuda {

// The statistics of this thread's part of a row.
template <typename Sides, typename Keeping>
__device__ __forceinline__ auto visit_for_statistics(Keeping& on_chip, const Slice<Sides>& slice) {
  GrowingRow<typename Sides::Real> mine;
  visit_for_sums(on_chip, slice, [&](int, const auto& z_s, const auto& z_t) {
    add_group(mine, z_s, z_t);
  });
  mine.move();
  return mine.row;
}

template <typename Sides, Kept kept>
__global__ void __launch_bounds__(OnChip<Sides, kept>::threads, OnChip<Sides, kept>::blocks_per_multiprocessor)
    row_loss_and_gradient_kernel(const Block<typename Sides::Real> block,
                                 const typename Sides::Real* weights,  // [n]
                                 const Gate<typename Sides::Real> gate_of, const Combine<typename Sides::Real> combine,
                                 typename Sides::Real* statistics,  // [n, 8], written
                                 typename Sides::Real* gate,        // [n], written
                                 typename Sides::Real* loss) {      // [n], written
  using Real = typename Sides::Real;
  if constexpr (kept == Kept::nothing || hardware::has_clusters) {
    char* memory = hardware::shared_memory();
    Merge<RowInBits<Real>> merge(memory);
    OnChip<Sides, kept> on_chip(memory + sizeof(typename Merge<RowInBits<Real>>::Scratch), block.columns);
    const int row = hardware::cluster_index();
    const Slice<Sides> slice(block, row, hardware::cluster_rank(), hardware::cluster_size());
    RowStatistics<Real> numbers;
    Real opened = 0, of_weight_one = 0;
    Coefficients<Real> k{0, 0, 0};
    if (hardware::load_number(weights + row) != 0) {
      numbers = merge.over_the_cluster(visit_for_statistics(on_chip, slice)).in_nats();
      opened = gate_of(numbers);
      const Real weight = hardware::load_number(weights + row);  // again: it would take a register through the visit
      of_weight_one = gated_loss(numbers, opened, combine);
      k = gated_coefficients(numbers, opened, weight, combine);
    }
    if (hardware::cluster_rank() == 0 && hardware::thread_index() == 0) {
      store_statistics(statistics, row, numbers);
      hardware::store_number(gate + row, opened);
      hardware::store_number(loss + row, of_weight_one);
    }
    write_gradient(slice, RowGradient<Real>(numbers, k, block.slope),
                   [&](auto aligned, auto function) { on_chip.template visit_again<aligned.value>(slice, function); });
  }
}

template <typename Sides>
__global__ void __launch_bounds__(OnChip<Sides, Kept::nothing>::threads,
                                  OnChip<Sides, Kept::nothing>::blocks_per_multiprocessor)
    row_statistics_kernel(const Block<typename Sides::Real> block,
                          typename Sides::Real* statistics) {  // [n, 8], written
  using Real = typename Sides::Real;
  char* memory = hardware::shared_memory();
  Merge<RowInBits<Real>> merge(memory);
  OnChip<Sides, Kept::nothing> on_chip(memory + sizeof(typename Merge<RowInBits<Real>>::Scratch), block.columns);
  const int row = hardware::cluster_index();
  const Slice<Sides> slice(block, row, hardware::cluster_rank(), hardware::cluster_size());
  const RowStatistics<Real> numbers = merge.over_the_cluster(visit_for_statistics(on_chip, slice)).in_nats();
  if (hardware::cluster_rank() == 0 && hardware::thread_index() == 0) store_statistics(statistics, row, numbers);
}

template <typename Sides>
__global__ void __launch_bounds__(OnChip<Sides, Kept::nothing>::threads,
                                  OnChip<Sides, Kept::nothing>::blocks_per_multiprocessor)
    row_gradient_kernel(const Block<typename Sides::Real> block,
                        const typename Sides::Real* statistics,  // [n, 8]
                        const typename Sides::Real* a,           // [n]
                        const typename Sides::Real* b,           // [n]
                        const typename Sides::Real* c) {         // [n]
  using Real = typename Sides::Real;
  OnChip<Sides, Kept::nothing> on_chip(hardware::shared_memory(), block.columns);
  const int row = hardware::cluster_index();
  const Slice<Sides> slice(block, row, hardware::cluster_rank(), hardware::cluster_size());
  const RowGradient<Real> gradient(load_statistics(statistics, row), load_coefficients(a, b, c, row), block.slope);
  write_gradient(slice, gradient,
                 [&](auto aligned, auto function) { on_chip.template visit<aligned.value>(slice, function); });
}

}  // namespace eopd::cuda
