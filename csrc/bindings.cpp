// The module eopd_kernels._native: addresses, sizes and strides in, nothing of torch. Python has checked them.
#include "cpu/dispatch.h"
#include "module.h"

namespace {

using namespace eopd;
using namespace eopd::cpu;

using TaskArgument = std::tuple<Matrices, BlockShape, Transforms, int>;  // the last: threads

Task task_of(const TaskArgument& argument) {
  const auto& [matrices, shape, transforms, threads] = argument;
  return {problem_of(matrices, shape, transforms), threads};
}

const Kernels& kernels_of(const Task&) { return chosen_kernels(); }

py::tuple capabilities() {
  py::list names;
  for (const Kernels* kernels : available_kernels()) names.append(kernels->capability);
  return py::tuple(names);
}

bool openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The native kernels. A matrix is (address, dtype code, row stride in elements), dtype codes are 0 float32, "
      "1 bfloat16, 2 float16, 3 float64; all other arrays are contiguous, float64 where a side is, else float32. A task "
      "is ((student, teacher, out), (rows, columns), transforms, threads).";
  offer_row_functions(module, &task_of, &kernels_of, py::call_guard<py::gil_scoped_release>());
  module.def("capability", [] { return chosen_kernels().capability; },
             "The instruction set in use: the widest there is, or that of EOPD_CPU_CAPABILITY.");
  module.def("capabilities", &capabilities, "The instruction sets compiled in and supported by this processor.");
  module.def("openmp", &openmp, "Whether rows are shared out among threads.");
}
