// What the modules _native and _cuda have in common: how Python describes a problem, and the five row functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "problem.h"

namespace eopd {

namespace py = pybind11;

using MatrixArgument = std::tuple<uintptr_t, int, int64_t>;  // address, dtype code, row stride in elements
using Matrices = std::array<MatrixArgument, 3>;              // student, teacher, out
using BlockShape = std::array<int64_t, 2>;                   // rows, columns
using Transforms = std::array<double, 6>;                    // student scale, softcap, temperature, then the teacher's

inline Matrix matrix_of(const MatrixArgument& argument) {
  const auto [address, dtype, row_stride] = argument;
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype codes are 0 to 3, got " + std::to_string(dtype));
  return {reinterpret_cast<void*>(address), static_cast<DType>(dtype), row_stride};
}

inline Problem problem_of(const Matrices& matrices, const BlockShape& shape, const Transforms& t) {
  const auto& [student, teacher, out] = matrices;
  return {matrix_of(student), matrix_of(teacher), matrix_of(out), {t[0], t[1], t[2]}, {t[3], t[4], t[5]}, shape[0],
          shape[1]};
}

// The function as Python calls it: the one of the kernels that take this task. A block without rows launches nothing.
template <typename Task, typename Argument, typename Kernels, typename... Arguments>
auto bound(Task (*task_of)(const Argument&), const Kernels& (*kernels_of)(const Task&),
           void (*RowFunctions<Task>::*function)(const Task&, Arguments...)) {
  return [=](const Argument& argument, Arguments... arguments) {
    const Task task = task_of(argument);
    const Kernels& kernels = kernels_of(task);
    if (task.rows > 0) (kernels.*function)(task, arguments...);
  };
}

// Gives the module the five row functions. Python describes a task by an Argument.
template <typename Task, typename Argument, typename Kernels, typename... Extra>
void offer_row_functions(py::module_& module, Task (*task_of)(const Argument&),
                         const Kernels& (*kernels_of)(const Task&), const Extra&... extra) {
  using Functions = RowFunctions<Task>;
  using py::arg;
  module.def("row_statistics", bound(task_of, kernels_of, &Functions::row_statistics), arg("task"), arg("statistics"), extra...,
             "Writes the eight numbers of every row into statistics [rows, 8].");
  module.def("row_gradient", bound(task_of, kernels_of, &Functions::row_gradient), arg("task"), arg("statistics"), arg("a"),
             arg("b"), arg("c"), extra...,
             "Writes p (a + b log(p / q)) - c q, chained to the raw student logits, into out [rows, columns].");
  module.def("row_loss_and_gradient", bound(task_of, kernels_of, &Functions::row_loss_and_gradient), arg("task"), arg("weights"),
             arg("gate_threshold"), arg("combine"), arg("statistics"), arg("gate"), arg("loss"), extra...,
             "Both at once: the numbers, the gate on the teacher's entropy, and the loss and gradient that follow.");
  module.def("row_mixture", bound(task_of, kernels_of, &Functions::row_mixture), arg("task"), arg("statistics"), arg("skews"),
             arg("mixture"), extra..., "Writes the skewed divergences and shares of every row into mixture [rows, 4].");
  module.def("row_mixture_gradient", bound(task_of, kernels_of, &Functions::row_mixture_gradient), arg("task"),
             arg("statistics"), arg("a"), arg("b"), arg("c"), arg("skews"), extra...,
             "Writes the gradient of skewed divergences, chained to the raw student logits, into out [rows, columns].");
}

}  // namespace eopd
