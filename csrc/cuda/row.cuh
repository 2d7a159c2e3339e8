// A row as it is shared out: | head | group | group | ... | tail |, and the groups among the CTAs of a cluster.
//
// Groups begin where as many of the matrices as possible are aligned to 16 bytes, so that V and the row strides may be
// anything. Head and tail are shorter than a group; their columns go one by one to threads of the cluster's first CTA.
#pragma once

#include "columns.cuh"
#include "storage.cuh"

namespace eopd::cuda {

// A block of rows, as a kernel is given it.
template <typename Real>
struct Block {
  Matrix student, teacher, out;  // [n, V]; out may be the student
  LogitTransforms<Real> transforms;
  Slope<Real> slope;
  int rows, columns;
};

__device__ __forceinline__ char* row_of(const Matrix& matrix, int row) {
  return static_cast<char*>(matrix.data) + row * matrix.row_stride * bytes_of(matrix.dtype);
}

// Whether a group that begins at `column` can be moved as a whole.
template <int columns>
__device__ __forceinline__ bool is_aligned(const char* row, int column, int bytes) {
  const int width = columns * bytes < 16 ? columns * bytes : 16;
  return (reinterpret_cast<uintptr_t>(row) + column * bytes) % width == 0;
}

// A CTA's part of one row.
template <typename Sides>
struct Slice {
  using Real = typename Sides::Real;
  static constexpr int columns = Sides::columns;
  static constexpr bool in_groups = columns > 1;  // else a group is a column, and loaded by itself

  const Block<Real>& block;
  const char* student;
  const char* teacher;
  char* out;
  bool student_aligned = false, teacher_aligned = false, out_aligned = false;
  bool aligned = false;  // all three
  int head = 0;
  int edges = 0;   // columns of head and tail, where they are this CTA's
  int all_groups;  // of the row
  int first_column, groups;  // of this CTA

  __device__ __forceinline__ Slice(const Block<Real>& of, int row, int part, int parts)
      : block(of), student(row_of(of.student, row)), teacher(row_of(of.teacher, row)), out(row_of(of.out, row)) {
    if constexpr (in_groups) align();
    all_groups = (of.columns - head) / columns;
    if (all_groups < 0) all_groups = 0;
    const int most = (all_groups + parts - 1) / parts;
    const int first = part * most < all_groups ? part * most : all_groups;
    groups = first + most < all_groups ? most : all_groups - first;
    first_column = head + first * columns;
    if (part == 0) edges = of.columns - all_groups * columns;
  }

  // Calls function(column, z_s, z_t) for each column of head and tail that is this thread's.
  template <typename Function>
  __device__ __forceinline__ void visit_edges(Function function) const {
    for (int edge = hardware::thread_index(); edge < edges; edge += hardware::threads_per_block()) {
      const int column = edge < head ? edge : edge + all_groups * columns;
      Real z_s[1] = {load_scalar<Real>(student, column, block.student.dtype)};
      Real z_t[1] = {load_scalar<Real>(teacher, column, block.teacher.dtype)};
      block.transforms(z_s, z_t);
      function(column, z_s, z_t);
    }
  }

  // Calls function(true_type) where groups of all matrices can be moved as a whole, which is the usual case, or
  // function(false_type): a loop that is compiled for the first asks no matrix, which took a third of its instructions.
  template <typename Function>
  __device__ __forceinline__ void with_alignment(Function function) const {
    if constexpr (in_groups) {
      if (aligned) return function(std::true_type{});
    }
    function(std::false_type{});
  }

  // Writes exact zeros, for a row whose logits nobody reads.
  __device__ __forceinline__ void write_zeros() const {
    const Real zeros[columns] = {};
    for (int group = hardware::thread_index(); group < groups; group += hardware::threads_per_block())
      store_group(out, first_column + group * columns, block.out.dtype, out_aligned, zeros);
    for (int edge = hardware::thread_index(); edge < edges; edge += hardware::threads_per_block())
      store_scalar(out, edge < head ? edge : edge + all_groups * columns, block.out.dtype, Real(0));
  }

 private:
  __device__ __forceinline__ void align() {
    const int out_bytes = bytes_of(block.out.dtype);
    int most = -1;
    for (int column = 0; column < columns; ++column) {
      const bool of_student = is_aligned<columns>(student, column, Sides::Student::bytes);
      const bool of_teacher = is_aligned<columns>(teacher, column, Sides::Teacher::bytes);
      const bool of_out = is_aligned<columns>(out, column, out_bytes);
      if (of_student + of_teacher + of_out <= most) continue;
      most = of_student + of_teacher + of_out;
      head = column;
      student_aligned = of_student, teacher_aligned = of_teacher, out_aligned = of_out;
    }
    aligned = most == 3;
    if (head > block.columns) head = block.columns;
  }
};

}  // namespace eopd::cuda
