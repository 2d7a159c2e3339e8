// From a problem and a plan to a launch; what the bindings call. Nothing here needs nvcc.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace eopd::cuda {

struct Problem {
  Matrix student, teacher;  // [rows, columns]
  Transform student_transform, teacher_transform;
  int64_t rows, columns;
};

// How a row is shared out and kept, as backends/cuda/plan.py has decided.
struct Plan {
  int kept;      // of on_chip.cuh: nothing, shared, registers
  int cluster;   // CTAs that share a row
  int threads;   // of a CTA
  int clusters;  // at most so many, each with every so manieth row
};

// The device and the stream of a launch.
struct Place {
  int device;
  uintptr_t stream;
};

// Arrays are double where either side is float64, else float. Each function throws std::runtime_error with the name of
// the kernel or the call that failed.
void row_statistics(const Problem&, const Plan&, const Place&,
                    void* statistics);  // [rows, 8]
void row_gradient(const Problem&, const Plan&, const Place&,
                  const void* statistics,  // [rows, 8]
                  const void* a,           // [rows]
                  const void* b,           // [rows]
                  const void* c,           // [rows]
                  const Matrix& out);      // [rows, columns], may be the student
void row_loss_and_gradient(const Problem&, const Plan&, const Place&,
                           const void* weights,  // [rows]
                           double gate_threshold,
                           const double* combine,  // [4]
                           void* statistics,       // [rows, 8]
                           void* gate,             // [rows]
                           const Matrix& out);     // [rows, columns], may be the student

void row_mixture(const Problem&, const Plan&, const Place&,
                 const void* statistics,  // [rows, 8], of whole rows
                 const double* skews,     // [2]
                 void* mixture);          // [rows, 4]
void row_mixture_gradient(const Problem&, const Plan&, const Place&,
                          const void* statistics,  // [rows, 8], of whole rows
                          const void* a,           // [rows]
                          const void* b,           // [rows]
                          const void* c,           // [rows]
                          const double* skews,     // [2]
                          const Matrix& out);      // [rows, columns], may be the student

// Dynamic shared memory that row_loss_and_gradient takes per CTA.
int64_t shared_bytes(const Problem&, const Plan&);

// One pair of widths each: compiled in objects of their own, so that the build is parallel.
struct Launchers {
  decltype(&eopd::cuda::row_statistics) row_statistics;
  decltype(&eopd::cuda::row_gradient) row_gradient;
  decltype(&eopd::cuda::row_loss_and_gradient) row_loss_and_gradient;
  decltype(&eopd::cuda::row_mixture) row_mixture;
  decltype(&eopd::cuda::row_mixture_gradient) row_mixture_gradient;
  decltype(&eopd::cuda::shared_bytes) shared_bytes;
};

}  // namespace eopd::cuda
