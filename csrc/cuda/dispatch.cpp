#include "launchers.h"

namespace eopd::cuda {

extern const Launchers launchers_32_32, launchers_32_16, launchers_16_32, launchers_16_16, launchers_any;

const Launchers& launchers_of(const Task& task) {
  const DType student = task.student.dtype, teacher = task.teacher.dtype;
  if (student == DType::float64 || teacher == DType::float64) return launchers_any;
  if (student == DType::float32) return teacher == DType::float32 ? launchers_32_32 : launchers_32_16;
  return teacher == DType::float32 ? launchers_16_32 : launchers_16_16;
}

}  // namespace eopd::cuda
