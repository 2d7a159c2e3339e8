// The launchers that the bindings call, from a task to a launch. Nothing here needs nvcc.
#pragma once

#include "../problem.h"

namespace eopd::cuda {

// How a row is shared out and kept, as backends/cuda/plan.py has decided.
struct Plan {
  int kept;      // of on_chip.cuh: nothing, shared, registers
  int cluster;   // CTAs that share a row
  int threads;   // of a CTA
};

// The device and the stream of a launch.
struct Place {
  int device;
  uintptr_t stream;
};

struct Task : Problem {
  Plan plan;
  Place place;
};

// The launchers of one pair of widths, compiled in an object of their own, so that the build is parallel. Each throws
// std::runtime_error with the name of the kernel or the call that failed.
struct Launchers : RowFunctions<Task> {
  int64_t (*shared_bytes)(const Task&);  // the dynamic shared memory that row_loss_and_gradient takes per CTA
};

// The launchers of a task's dtypes.
const Launchers& launchers_of(const Task&);

}  // namespace eopd::cuda
