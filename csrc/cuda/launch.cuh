// The one way to launch a kernel; emulation/launch.h is its twin.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace eopd::cuda {

struct Shape {
  int clusters, cluster, threads;
  int64_t shared_bytes;
};

}  // namespace eopd::cuda

#ifdef EOPD_EMULATION
#include "../emulation/launch.h"
#else
#include <cuda_runtime.h>

namespace eopd::cuda {

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it has been seen
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Makes the device of a launch the current one. The runtime is this library's own, but shares the driver's contexts.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);  // which may make a context: not where nothing changed
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), const Shape& shape, const Place& place,
            const Arguments&... arguments) {
  constexpr int portable_cluster = 8;
  const OnDevice on_device(place.device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)),
        name + ", shared memory");
  if (shape.cluster > portable_cluster)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name + ", cluster size");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.clusters * shape.cluster);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;  // a device without clusters knows no such attribute
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace eopd::cuda
#endif
