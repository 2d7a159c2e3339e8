// The module eopd_kernels._native: addresses, sizes and strides in, nothing of torch. Python has checked them.
#include "cpu/dispatch.h"
#include "cpu/products.h"
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

#ifdef EOPD_X86_KERNELS
using OperandArgument = std::tuple<uintptr_t, int64_t, int64_t>;  // address, row and column stride in elements
using OutArgument = std::tuple<uintptr_t, int64_t>;               // address, row stride in elements
using ProductShape = std::array<int64_t, 3>;                      // rows, columns, depth

void multiply(const OperandArgument& left, const OperandArgument& right, const OutArgument& out,
              const ProductShape& shape, bool add, int threads) {
  const auto operand = [](const OperandArgument& argument) {
    const auto [address, row_stride, column_stride] = argument;
    return Operand{at<const uint16_t>(address), row_stride, column_stride};
  };
  const auto [address, row_stride] = out;
  const auto [rows, columns, depth] = shape;
  multiply_bfloat16({operand(left), operand(right), at<float>(address), row_stride, rows, columns, depth, add, threads});
}
#endif

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
  module.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether multiply_bfloat16 works on this processor.");
#ifdef EOPD_X86_KERNELS
  module.def("multiply_bfloat16", &multiply, py::arg("left"), py::arg("right"), py::arg("out"), py::arg("shape"),
             py::arg("add"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Writes or adds to out, float32, the product of two bfloat16 matrices, each with a stride of 1.");
#endif
}
