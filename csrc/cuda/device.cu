#include "device.h"

#include "launch.cuh"

namespace eopd::cuda {
namespace {

__global__ void nothing() {}

void check_that_kernels_run() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, nothing), "compiled for other architectures");
}

// The most CTAs of a cluster. Beyond 8 it depends on how a device's multiprocessors are grouped.
int largest_cluster(int major) {
  if (major < 9) return 1;
  check(cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(32);
  int size = 0;
  check(cudaOccupancyMaxPotentialClusterSize(&size, nothing, &config), "cudaOccupancyMaxPotentialClusterSize");
  return size;
}

}  // namespace

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

DeviceProperties properties_of(int device) {
  const OnDevice on_device(device);
  check_that_kernels_run();
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          properties.maxThreadsPerBlock,
          largest_cluster(properties.major),
          int64_t(properties.sharedMemPerBlockOptin),
          int64_t(properties.sharedMemPerMultiprocessor),
          int64_t(properties.reservedSharedMemPerBlock)};
}

}  // namespace eopd::cuda
