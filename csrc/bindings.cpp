// eopd_kernels._native: addresses, sizes and strides in, nothing of torch. The Python side has checked them.
#include "arguments.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using namespace eopd;
using namespace eopd::cpu;

Problem problem_of(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                   const Transforms& t, int threads) {
  return {matrix_of(student), matrix_of(teacher), {t[0], t[1], t[2]}, {t[3], t[4], t[5]}, rows, columns, threads};
}

void row_statistics(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                    const Transforms& transforms, uintptr_t statistics, int threads) {
  const Kernels& kernels = chosen_kernels();
  const Problem problem = problem_of(student, teacher, rows, columns, transforms, threads);
  py::gil_scoped_release release;
  kernels.row_statistics(problem, pointer_of<void*>(statistics));
}

void row_gradient(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                  const Transforms& transforms, uintptr_t statistics, uintptr_t a, uintptr_t b, uintptr_t c,
                  const MatrixArgument& out, int threads) {
  const Kernels& kernels = chosen_kernels();
  const Problem problem = problem_of(student, teacher, rows, columns, transforms, threads);
  const Matrix gradient = matrix_of(out);
  py::gil_scoped_release release;
  kernels.row_gradient(problem, pointer_of<const void*>(statistics), pointer_of<const void*>(a),
                       pointer_of<const void*>(b), pointer_of<const void*>(c), gradient);
}

void row_loss_and_gradient(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                           const Transforms& transforms, uintptr_t weights, double gate_threshold,
                           const std::array<double, 4>& combine, uintptr_t statistics, uintptr_t gate,
                           const MatrixArgument& out, int threads) {
  const Kernels& kernels = chosen_kernels();
  const Problem problem = problem_of(student, teacher, rows, columns, transforms, threads);
  const Matrix gradient = matrix_of(out);
  py::gil_scoped_release release;
  kernels.row_loss_and_gradient(problem, pointer_of<const void*>(weights), gate_threshold, combine.data(),
                                pointer_of<void*>(statistics), pointer_of<void*>(gate), gradient);
}

void row_mixture(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                 const Transforms& transforms, uintptr_t statistics, const std::array<double, 2>& skews,
                 uintptr_t mixture, int threads) {
  const Kernels& kernels = chosen_kernels();
  const Problem problem = problem_of(student, teacher, rows, columns, transforms, threads);
  py::gil_scoped_release release;
  kernels.row_mixture(problem, pointer_of<const void*>(statistics), skews.data(), pointer_of<void*>(mixture));
}

void row_mixture_gradient(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                          const Transforms& transforms, uintptr_t statistics, uintptr_t a, uintptr_t b, uintptr_t c,
                          const std::array<double, 2>& skews, const MatrixArgument& out, int threads) {
  const Kernels& kernels = chosen_kernels();
  const Problem problem = problem_of(student, teacher, rows, columns, transforms, threads);
  const Matrix gradient = matrix_of(out);
  py::gil_scoped_release release;
  kernels.row_mixture_gradient(problem, pointer_of<const void*>(statistics), pointer_of<const void*>(a),
                               pointer_of<const void*>(b), pointer_of<const void*>(c), skews.data(), gradient);
}

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
      "1 bfloat16, 2 float16, 3 float64; all other arrays are contiguous, float64 where a side is, else float32.";
  module.def("row_statistics", &row_statistics, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("statistics"), py::arg("threads"),
             "Writes the eight numbers of every row into statistics [rows, 8].");
  module.def("row_gradient", &row_gradient, py::arg("student"), py::arg("teacher"), py::arg("rows"), py::arg("columns"),
             py::arg("transforms"), py::arg("statistics"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("out"),
             py::arg("threads"),
             "Writes p (a + b log(p / q)) - c q, chained to the raw student logits, into out [rows, columns].");
  module.def("row_loss_and_gradient", &row_loss_and_gradient, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("weights"), py::arg("gate_threshold"),
             py::arg("combine"), py::arg("statistics"), py::arg("gate"), py::arg("out"), py::arg("threads"),
             "Both at once: the numbers, the gate on the teacher's entropy, and the gradient that follows from them.");
  module.def("row_mixture", &row_mixture, py::arg("student"), py::arg("teacher"), py::arg("rows"), py::arg("columns"),
             py::arg("transforms"), py::arg("statistics"), py::arg("skews"), py::arg("mixture"), py::arg("threads"),
             "Writes the skewed divergences and shares of every row into mixture [rows, 4].");
  module.def("row_mixture_gradient", &row_mixture_gradient, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("statistics"), py::arg("a"), py::arg("b"), py::arg("c"),
             py::arg("skews"), py::arg("out"), py::arg("threads"),
             "Writes their gradient, chained to the raw student logits, into out [rows, columns].");
  module.def("capability", [] { return chosen_kernels().capability; },
             "The instruction set in use: the widest there is, or that of EOPD_CPU_CAPABILITY.");
  module.def("capabilities", &capabilities, "The instruction sets compiled in and supported by this processor.");
  module.def("openmp", &openmp, "Whether rows are shared out among threads.");
}
