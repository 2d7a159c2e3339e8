// Visits of a row's columns by the threads that have them: sums in the first, the gradient in the second.
#pragma once

#include "on_chip.cuh"

namespace eopd::cuda {

// Calls function(first, z_s, z_t) for the transformed logits of a group, a few columns at a time.
template <typename Sides, typename Function>
__device__ __forceinline__ void in_steps(const Block<typename Sides::Real>& block,
                                         const typename Sides::StudentGroup& student,
                                         const typename Sides::TeacherGroup& teacher, Function function) {
#pragma unroll
  for (int first = 0; first < Sides::columns; first += Sides::step) {
    typename Sides::Real z_s[Sides::step], z_t[Sides::step];
    Sides::Student::widen(student, first, block.student.dtype, z_s);
    Sides::Teacher::widen(teacher, first, block.teacher.dtype, z_t);
    block.transforms(z_s, z_t);
    function(first, z_s, z_t);
  }
}

// Calls add(first, z_s, z_t) for all of this thread's columns.
template <typename Sides, typename Keeping, typename Add>
__device__ __forceinline__ void visit_for_sums(Keeping& on_chip, const Slice<Sides>& slice, Add add) {
  slice.visit_edges(add);
  slice.with_alignment([&](auto aligned) {
    on_chip.template visit<aligned.value>(slice, [&](int, const auto& student, const auto& teacher) {
      in_steps<Sides>(slice.block, student, teacher, add);
    });
  });
}

// Writes a row's gradient. `row` is what gradient_of takes besides columns; visit(aligned, function) is called with the
// function that writes the gradient of a group.
template <typename Sides, typename Row, typename Visit>
__device__ __forceinline__ void write_gradient(const Slice<Sides>& slice, const Row& row, Visit visit) {
  using Real = typename Sides::Real;
  if (row.zero) return slice.write_zeros();
  const auto& slope = slice.block.slope;
  slice.with_alignment([&](auto aligned) {
    visit(aligned, [&](int column, const auto& student, const auto& teacher) {
      Real gradient[Sides::columns];
      in_steps<Sides>(slice.block, student, teacher, [&](int first, const auto& z_s, const auto& z_t) {
        gradient_of(row, z_s, z_t, gradient + first);
        multiply_bz_slope(slope, z_s, gradient + first);
      });
      store_group(slice.out, column, slice.block.out.dtype, aligned.value || slice.out_aligned, gradient);
    });
  });
  slice.visit_edges([&](int column, const auto& z_s, const auto& z_t) {
    Real gradient[1];
    gradient_of(row, z_s, z_t, gradient);
    multiply_bz_slope(slope, z_s, gradient);
    store_scalar(slice.out, column, slice.block.out.dtype, gradient[0]);
  });
}

}  // namespace eopd::cuda
