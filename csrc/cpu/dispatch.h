// The choice of an instruction set.
#pragma once

#include <vector>

#include "kernels.h"

namespace eopd::cpu {

// The kernels that are compiled in and that this processor supports, the widest first.
std::vector<const Kernels*> available_kernels();

// The kernels that EOPD_CPU_CAPABILITY names, else the widest. Throws std::invalid_argument where it names none of them.
const Kernels& chosen_kernels();

// Whether products.h works here: the chosen kernels are those of AVX-512, and the processor multiplies bfloat16.
bool multiplies_bfloat16();

}  // namespace eopd::cpu
