// Which instruction set the kernels run on.
#pragma once

#include <vector>

#include "kernels.h"

namespace eopd::cpu {

// Compiled in and supported by this processor, the widest first.
std::vector<const Kernels*> available_kernels();

// Those of EOPD_CPU_CAPABILITY, or else the widest. Throws std::invalid_argument where the variable names none there are.
const Kernels& chosen_kernels();

}  // namespace eopd::cpu
