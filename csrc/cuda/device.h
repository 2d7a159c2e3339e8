// The properties of a device that backends/cuda/plan.py decides by.
#pragma once

#include <cstdint>
#include <string>

namespace eopd::cuda {

struct DeviceProperties {
  std::string name;
  int major, minor, multiprocessors, threads_per_block, largest_cluster;
  int64_t shared_per_block, shared_per_multiprocessor, shared_reserved;  // bytes; the last is what each CTA costs on top
};

// Both throw std::runtime_error with the reason: no driver, or kernels that were not compiled for this device.
int device_count();
DeviceProperties properties_of(int device);

}  // namespace eopd::cuda
