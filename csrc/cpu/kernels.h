// The tables of kernels on a CPU, one per instruction set.
#pragma once

#include "../problem.h"

namespace eopd::cpu {

struct Task : Problem {
  int threads;
};

struct Kernels : RowFunctions<Task> {
  const char* capability;
};

}  // namespace eopd::cpu
