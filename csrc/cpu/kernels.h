// What the bindings hand to the kernels, and the table of functions each instruction set offers.
#pragma once

#include "../problem.h"

namespace eopd::cpu {

struct Problem {
  Matrix student, teacher;  // [rows, columns]
  Transform student_transform, teacher_transform;
  int64_t rows, columns;
  int threads;
};

// Arrays named `Real` are double where either side is float64, else float.
struct Kernels {
  const char* capability;
  void (*row_statistics)(const Problem&,
                         void* statistics);  // Real [rows, 8]
  void (*row_gradient)(const Problem&,
                       const void* statistics,  // Real [rows, 8]
                       const void* a,           // Real [rows]
                       const void* b,           // Real [rows]
                       const void* c,           // Real [rows]
                       const Matrix& out);      // [rows, columns], may be the student
  void (*row_loss_and_gradient)(const Problem&,
                                const void* weights,  // Real [rows]
                                double gate_threshold,
                                const double* combine,  // [4]
                                void* statistics,       // Real [rows, 8]
                                void* gate,             // Real [rows]
                                const Matrix& out);     // [rows, columns], may be the student
  void (*row_mixture)(const Problem&,
                      const void* statistics,  // Real [rows, 8], of whole rows
                      const double* skews,     // [2]
                      void* mixture);          // Real [rows, 4]
  void (*row_mixture_gradient)(const Problem&,
                               const void* statistics,  // Real [rows, 8], of whole rows
                               const void* a,           // Real [rows]
                               const void* b,           // Real [rows]
                               const void* c,           // Real [rows]
                               const double* skews,     // [2]
                               const Matrix& out);      // [rows, columns], may be the student
};

}  // namespace eopd::cpu
