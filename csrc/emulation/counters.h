// The state of the emulated device: its properties, the order of its fibres, the bytes that kernels moved.
#pragma once

#include <cstdint>

namespace eopd::emulation {

struct Counters {
  int64_t logit_bytes = 0, gradient_bytes = 0, number_bytes = 0;  // loaded, stored, both
  int64_t vector_loads = 0, scalar_loads = 0, launches = 0;
};

struct Settings {
  uint64_t seed = 0;
};

// The properties of the emulated device. 64 threads are the fewest with a second warp. A CTA has so little shared memory
// that the tests' vocabularies need clusters: of 2 for 611 columns in float32, 4 for 1,300, 16 for 5,003. What the ring of
// the streaming kernel takes is not counted against it.
struct Device {
  int major = 9, minor = 0, multiprocessors = 8;
  int64_t shared_per_block = 5 << 10, shared_per_multiprocessor = 12 << 10, shared_reserved = 1 << 10;
  int threads_per_block = 64, largest_cluster = 16;
};

inline Counters& counters() {
  static Counters all;
  return all;
}

inline Settings& settings() {
  static Settings all;
  return all;
}

inline Device& device() {
  static Device one;
  return one;
}

}  // namespace eopd::emulation
