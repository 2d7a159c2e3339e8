#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace eopd::cpu {

extern const Kernels kernels_portable;
#ifdef EOPD_X86_KERNELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available;
#ifdef EOPD_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    available.push_back(&kernels_avx512);
  if (avx2) available.push_back(&kernels_avx2);
#endif
  available.push_back(&kernels_portable);
  return available;
}

const Kernels& chosen_kernels() {
  const std::vector<const Kernels*> available = available_kernels();
  const char* wanted = std::getenv("EOPD_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *available.front();
  std::string names;
  for (const Kernels* kernels : available) {
    if (std::string(wanted) == kernels->capability) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->capability);
  }
  throw std::invalid_argument("EOPD_CPU_CAPABILITY is \"" + std::string(wanted) +
                              "\"; this processor and build have " + names);
}

bool multiplies_bfloat16() {
#ifdef EOPD_X86_KERNELS
  return &chosen_kernels() == &kernels_avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace eopd::cpu
