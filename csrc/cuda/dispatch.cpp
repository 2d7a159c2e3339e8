// Which pair of widths a problem has.
#include "launchers.h"

namespace eopd::cuda {

extern const Launchers launchers_32_32, launchers_32_16, launchers_16_32, launchers_16_16, launchers_any;

namespace {

const Launchers& launchers_of(const Problem& problem) {
  const DType student = problem.student.dtype, teacher = problem.teacher.dtype;
  if (student == DType::float64 || teacher == DType::float64) return launchers_any;
  if (student == DType::float32) return teacher == DType::float32 ? launchers_32_32 : launchers_32_16;
  return teacher == DType::float32 ? launchers_16_32 : launchers_16_16;
}

}  // namespace

void row_statistics(const Problem& problem, const Plan& plan, const Place& place, void* statistics) {
  launchers_of(problem).row_statistics(problem, plan, place, statistics);
}

void row_gradient(const Problem& problem, const Plan& plan, const Place& place, const void* statistics, const void* a,
                  const void* b, const void* c, const Matrix& out) {
  launchers_of(problem).row_gradient(problem, plan, place, statistics, a, b, c, out);
}

void row_loss_and_gradient(const Problem& problem, const Plan& plan, const Place& place, const void* weights,
                           double gate_threshold, const double* combine, void* statistics, void* gate,
                           const Matrix& out) {
  launchers_of(problem).row_loss_and_gradient(problem, plan, place, weights, gate_threshold, combine, statistics, gate,
                                              out);
}

void row_mixture(const Problem& problem, const Plan& plan, const Place& place, const void* statistics,
                 const double* skews, void* mixture) {
  launchers_of(problem).row_mixture(problem, plan, place, statistics, skews, mixture);
}

void row_mixture_gradient(const Problem& problem, const Plan& plan, const Place& place, const void* statistics,
                          const void* a, const void* b, const void* c, const double* skews, const Matrix& out) {
  launchers_of(problem).row_mixture_gradient(problem, plan, place, statistics, a, b, c, skews, out);
}

int64_t shared_bytes(const Problem& problem, const Plan& plan) {
  return launchers_of(problem).shared_bytes(problem, plan);
}

}  // namespace eopd::cuda
