// What every set of kernels is handed: a block of logits on either side, and the five functions that it is handed to.
#pragma once

#include <array>
#include <cstdint>

namespace eopd {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A block of rows: last stride 1, any row stride (in elements), any alignment.
struct Matrix {
  void* data;  // [rows, columns]
  DType dtype;
  int64_t row_stride;
};

// z = softcap * tanh(scale * x / softcap) / temperature; softcap 0 stands for none.
struct Transform {
  double scale, softcap, temperature;
};

struct Problem {
  Matrix student, teacher;  // [rows, columns]
  Matrix out;               // [rows, columns]; may be the student, and is where nothing is written
  Transform student_transform, teacher_transform;
  int64_t rows, columns;
};

// The address of a contiguous array of Real, which is double where either side is float64, else float.
using Address = uintptr_t;

// One set of kernels. A Task is a problem and what these kernels are told beside it.
template <typename Task>
struct RowFunctions {
  void (*row_statistics)(const Task&,
                         Address statistics);  // [rows, 8], written
  void (*row_gradient)(const Task&,
                       Address statistics,  // [rows, 8]
                       Address a,           // [rows]
                       Address b,           // [rows]
                       Address c);          // [rows]
  void (*row_loss_and_gradient)(const Task&,
                                Address weights,  // [rows]
                                double gate_threshold, const std::array<double, 4>& combine,
                                Address statistics,  // [rows, 8], written
                                Address gate,        // [rows], written
                                Address loss);       // [rows], written
  void (*row_mixture)(const Task&,
                      Address statistics,  // [rows, 8], of whole rows
                      const std::array<double, 2>& skews,
                      Address mixture);  // [rows, 4], written
  void (*row_mixture_gradient)(const Task&,
                               Address statistics,  // [rows, 8], of whole rows
                               Address a,           // [rows]
                               Address b,           // [rows]
                               Address c,           // [rows]
                               const std::array<double, 2>& skews);
};

template <typename Real>
Real* at(Address array) {
  return reinterpret_cast<Real*>(array);
}

}  // namespace eopd
