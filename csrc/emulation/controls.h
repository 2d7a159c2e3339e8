// The functions that only the emulated module offers to Python: the device it pretends to be, the order of its fibres, its counters.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "../cuda/device.h"
#include "counters.h"

namespace eopd::cuda {

inline int device_count() { return 1; }

inline DeviceProperties properties_of(int) {
  const emulation::Device& device = emulation::device();
  return {"emulated on CPU tensors: for tests",
          device.major,
          device.minor,
          device.multiprocessors,
          device.threads_per_block,
          device.largest_cluster,
          device.shared_per_block,
          device.shared_per_multiprocessor,
          device.shared_reserved};
}

}  // namespace eopd::cuda

namespace eopd::emulation {

inline std::map<std::string, int64_t> counted() {
  const Counters& all = counters();
  return {{"logit_bytes", all.logit_bytes},   {"gradient_bytes", all.gradient_bytes},
          {"number_bytes", all.number_bytes}, {"vector_loads", all.vector_loads},
          {"scalar_loads", all.scalar_loads}, {"launches", all.launches}};
}

inline void offer_controls(pybind11::module_& module) {
  module.attr("device_type") = "cpu";
  pybind11::module_ driver = module.def_submodule("driver", "What torch.cuda is to the extension.");
  driver.def("current_device", [] { return 0; });
  driver.def("current_stream", [](const pybind11::object&) {
    return pybind11::module_::import("types").attr("SimpleNamespace")(pybind11::arg("cuda_stream") = 0);
  });
  module.def("set_seed", [](uint64_t seed) { settings().seed = seed; });
  module.def("reset_counters", [] { counters() = {}; });
  module.def("counters", &counted);
}

}  // namespace eopd::emulation
