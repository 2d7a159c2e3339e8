// eopd_kernels._cuda: addresses, sizes and strides in, nothing of torch. The Python side has checked them, and hands over
// the plan, the device and the stream. Compiled with EOPD_EMULATION it is the module that runs on a CPU.
#include "../arguments.h"
#include "device.h"
#include "launchers.h"
#ifdef EOPD_EMULATION
#include "../emulation/controls.h"
#endif

namespace py = pybind11;

namespace {

using namespace eopd;
using namespace eopd::cuda;

using PlanArgument = std::tuple<int, int, int, int>;    // kept, cluster, threads, clusters
using PlaceArgument = std::tuple<int, uintptr_t>;       // device, stream

Problem problem_of(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                   const Transforms& t) {
  return {matrix_of(student), matrix_of(teacher), {t[0], t[1], t[2]}, {t[3], t[4], t[5]}, rows, columns};
}

Plan plan_of(const PlanArgument& argument) {
  const auto [kept, cluster, threads, clusters] = argument;
  return {kept, cluster, threads, clusters};
}

Place place_of(const PlaceArgument& argument) {
  const auto [device, stream] = argument;
  return {device, stream};
}

void statistics_of_rows(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                        const Transforms& transforms, const PlanArgument& plan, const PlaceArgument& place,
                        uintptr_t statistics) {
  if (rows == 0) return;
  row_statistics(problem_of(student, teacher, rows, columns, transforms), plan_of(plan), place_of(place),
                 pointer_of<void*>(statistics));
}

void gradient_of_rows(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                      const Transforms& transforms, const PlanArgument& plan, const PlaceArgument& place,
                      uintptr_t statistics, uintptr_t a, uintptr_t b, uintptr_t c, const MatrixArgument& out) {
  if (rows == 0) return;
  row_gradient(problem_of(student, teacher, rows, columns, transforms), plan_of(plan), place_of(place),
               pointer_of<const void*>(statistics), pointer_of<const void*>(a), pointer_of<const void*>(b),
               pointer_of<const void*>(c), matrix_of(out));
}

void loss_and_gradient_of_rows(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows,
                               int64_t columns, const Transforms& transforms, const PlanArgument& plan,
                               const PlaceArgument& place, uintptr_t weights, double gate_threshold,
                               const std::array<double, 4>& combine, uintptr_t statistics, uintptr_t gate,
                               const MatrixArgument& out) {
  if (rows == 0) return;
  row_loss_and_gradient(problem_of(student, teacher, rows, columns, transforms), plan_of(plan), place_of(place),
                        pointer_of<const void*>(weights), gate_threshold, combine.data(),
                        pointer_of<void*>(statistics), pointer_of<void*>(gate), matrix_of(out));
}

void mixture_of_rows(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows, int64_t columns,
                     const Transforms& transforms, const PlanArgument& plan, const PlaceArgument& place,
                     uintptr_t statistics, const std::array<double, 2>& skews, uintptr_t mixture) {
  if (rows == 0) return;
  row_mixture(problem_of(student, teacher, rows, columns, transforms), plan_of(plan), place_of(place),
              pointer_of<const void*>(statistics), skews.data(), pointer_of<void*>(mixture));
}

void mixture_gradient_of_rows(const MatrixArgument& student, const MatrixArgument& teacher, int64_t rows,
                              int64_t columns, const Transforms& transforms, const PlanArgument& plan,
                              const PlaceArgument& place, uintptr_t statistics, uintptr_t a, uintptr_t b, uintptr_t c,
                              const std::array<double, 2>& skews, const MatrixArgument& out) {
  if (rows == 0) return;
  row_mixture_gradient(problem_of(student, teacher, rows, columns, transforms), plan_of(plan), place_of(place),
                       pointer_of<const void*>(statistics), pointer_of<const void*>(a), pointer_of<const void*>(b),
                       pointer_of<const void*>(c), skews.data(), matrix_of(out));
}

int64_t shared_bytes_of(int student_dtype, int teacher_dtype, int64_t columns, const PlanArgument& plan) {
  const Transforms none{1, 0, 1, 1, 0, 1};
  return shared_bytes(problem_of({0, student_dtype, 0}, {0, teacher_dtype, 0}, 1, columns, none), plan_of(plan));
}

py::dict properties(int device) {
  const DeviceProperties of = properties_of(device);
  return py::dict(py::arg("name") = of.name, py::arg("capability") = py::make_tuple(of.major, of.minor),
                  py::arg("multiprocessors") = of.multiprocessors, py::arg("threads_per_block") = of.threads_per_block,
                  py::arg("largest_cluster") = of.largest_cluster, py::arg("shared_per_block") = of.shared_per_block,
                  py::arg("shared_per_multiprocessor") = of.shared_per_multiprocessor,
                  py::arg("shared_reserved") = of.shared_reserved);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() =
      "The CUDA kernels. A matrix is (address, dtype code, row stride in elements), dtype codes are 0 float32, "
      "1 bfloat16, 2 float16, 3 float64; all other arrays are contiguous, float64 where a side is, else float32. A plan "
      "is (where a row is kept, CTAs of a cluster, threads of a CTA, most clusters), a place (device, stream).";
  module.def("row_statistics", &statistics_of_rows, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("plan"), py::arg("place"), py::arg("statistics"),
             "Writes the eight numbers of every row into statistics [rows, 8].");
  module.def("row_gradient", &gradient_of_rows, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("plan"), py::arg("place"), py::arg("statistics"),
             py::arg("a"), py::arg("b"), py::arg("c"), py::arg("out"),
             "Writes p (a + b log(p / q)) - c q, chained to the raw student logits, into out [rows, columns].");
  module.def("row_loss_and_gradient", &loss_and_gradient_of_rows, py::arg("student"), py::arg("teacher"),
             py::arg("rows"), py::arg("columns"), py::arg("transforms"), py::arg("plan"), py::arg("place"),
             py::arg("weights"), py::arg("gate_threshold"), py::arg("combine"), py::arg("statistics"), py::arg("gate"),
             py::arg("out"),
             "Both at once: the numbers, the gate on the teacher's entropy, and the gradient that follows from them.");
  module.def("row_mixture", &mixture_of_rows, py::arg("student"), py::arg("teacher"), py::arg("rows"),
             py::arg("columns"), py::arg("transforms"), py::arg("plan"), py::arg("place"), py::arg("statistics"),
             py::arg("skews"), py::arg("mixture"),
             "Writes the skewed divergences and shares of every row into mixture [rows, 4].");
  module.def("row_mixture_gradient", &mixture_gradient_of_rows, py::arg("student"), py::arg("teacher"),
             py::arg("rows"), py::arg("columns"), py::arg("transforms"), py::arg("plan"), py::arg("place"),
             py::arg("statistics"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("skews"), py::arg("out"),
             "The gradient of skewed divergences, chained to the raw student logits, into out [rows, columns].");
  module.def("shared_bytes", &shared_bytes_of, py::arg("student_dtype"), py::arg("teacher_dtype"), py::arg("columns"),
             py::arg("plan"), "Shared memory that row_loss_and_gradient takes per CTA.");
  module.def("device_count", &device_count, "How many devices the driver has; raises RuntimeError where it has none.");
  module.def("properties", &properties, py::arg("device"), "What the choice of a plan depends on.");
#ifdef EOPD_EMULATION
  eopd::emulation::offer_controls(module);
#endif
}
