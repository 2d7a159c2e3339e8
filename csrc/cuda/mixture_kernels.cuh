// The two row functions of skewed divergences, one visit each: docs/math.md, "Skewed divergences".
#pragma once

#include "merge.cuh"
#include "mixture.cuh"
#include "numbers.cuh"
#include "visits.cuh"

namespace eopd::cuda {

template <typename Sides>
__global__ void __launch_bounds__(OnChip<Sides, Kept::nothing>::threads,
                                  OnChip<Sides, Kept::nothing>::blocks_per_multiprocessor)
    row_mixture_kernel(const Block<typename Sides::Real> block,
                       const typename Sides::Real* statistics,  // [n, 8], of whole rows
                       const Skews<typename Sides::Real> skews,
                       typename Sides::Real* mixture) {  // [n, 4], written
  using Real = typename Sides::Real;
  using Sums = MixtureStatistics<Real>;
  char* memory = hardware::shared_memory();
  Merge<Sums> merge(memory);
  OnChip<Sides, Kept::nothing> on_chip(memory + sizeof(typename Merge<Sums>::Scratch), block.columns);
  const int row = hardware::cluster_index();
  const Slice<Sides> slice(block, row, hardware::cluster_rank(), hardware::cluster_size());
  const RowStatistics<Real> numbers = load_statistics(statistics, row);
  const MixtureRow<Real> mixed = mixture_row(numbers, skews);
  Sums mine;
  visit_for_sums(on_chip, slice, [&](int, const auto& z_s, const auto& z_t) {
    add_group(mine, mixed, z_s, z_t);
  });
  const Sums sums = merge.over_the_cluster(mine);
  if (hardware::cluster_rank() == 0 && hardware::thread_index() == 0)
    store_mixture(mixture, row, normalised(sums, numbers));
}

template <typename Sides>
__global__ void __launch_bounds__(OnChip<Sides, Kept::nothing>::threads,
                                  OnChip<Sides, Kept::nothing>::blocks_per_multiprocessor)
    row_mixture_gradient_kernel(const Block<typename Sides::Real> block,
                                const typename Sides::Real* statistics,  // [n, 8], of whole rows
                                const typename Sides::Real* a,           // [n]
                                const typename Sides::Real* b,           // [n]
                                const typename Sides::Real* c,           // [n]
                                const Skews<typename Sides::Real> skews) {
  using Real = typename Sides::Real;
  OnChip<Sides, Kept::nothing> on_chip(hardware::shared_memory(), block.columns);
  const int row = hardware::cluster_index();
  const Slice<Sides> slice(block, row, hardware::cluster_rank(), hardware::cluster_size());
  const MixtureRowGradient<Real> gradient(load_statistics(statistics, row), load_coefficients(a, b, c, row), skews,
                                          block.slope);
  write_gradient(slice, gradient,
                 [&](auto aligned, auto function) { on_chip.template visit<aligned.value>(slice, function); });
}

}  // namespace eopd::cuda
