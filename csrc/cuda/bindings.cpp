// The module eopd_kernels._cuda: addresses, sizes and strides in, nothing of torch. Python has checked them, and hands
// over the plan, the device and the stream. Compiled with EOPD_EMULATION it is the module that runs on a CPU.
#include "../module.h"
#include "device.h"
#include "launchers.h"
#ifdef EOPD_EMULATION
#include "../emulation/controls.h"
#endif

namespace {

using namespace eopd;
using namespace eopd::cuda;

using PlanArgument = std::tuple<int, int, int>;       // kept, cluster, threads
using PlaceArgument = std::tuple<int, uintptr_t>;     // device, stream

using TaskArgument = std::tuple<Matrices, BlockShape, Transforms, PlanArgument, PlaceArgument>;

Task task_of(const TaskArgument& argument) {
  const auto& [matrices, shape, transforms, plan, place] = argument;
  const auto [kept, cluster, threads] = plan;
  const auto [device, stream] = place;
  return {problem_of(matrices, shape, transforms), {kept, cluster, threads}, {device, stream}};
}

int64_t shared_bytes_of(int student_dtype, int teacher_dtype, int64_t columns, const PlanArgument& plan) {
  const MatrixArgument student{0, student_dtype, 0}, teacher{0, teacher_dtype, 0};
  const Task task = task_of({{student, teacher, student}, {1, columns}, {1, 0, 1, 1, 0, 1}, plan, {0, 0}});
  return launchers_of(task).shared_bytes(task);
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
      "is (where a row is kept, CTAs of a cluster, threads of a CTA), a place (device, stream), a task "
      "((student, teacher, out), (rows, columns), transforms, plan, place).";
  offer_row_functions(module, &task_of, &launchers_of);
  module.def("shared_bytes", &shared_bytes_of, py::arg("student_dtype"), py::arg("teacher_dtype"), py::arg("columns"),
             py::arg("plan"), "Shared memory that row_loss_and_gradient takes per CTA.");
  module.def("device_count", &device_count, "How many devices the driver has; raises RuntimeError where it has none.");
  module.def("properties", &properties, py::arg("device"), "What the choice of a plan depends on.");
#ifdef EOPD_EMULATION
  eopd::emulation::offer_controls(module);
#endif
}
