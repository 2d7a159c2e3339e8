// How Python names memory to the extensions: tuples of addresses and numbers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "problem.h"

namespace eopd {

using MatrixArgument = std::tuple<uintptr_t, int, int64_t>;  // address, dtype code, row stride in elements
using Transforms = std::array<double, 6>;                    // student scale, softcap, temperature, then the teacher's

inline Matrix matrix_of(const MatrixArgument& argument) {
  const auto [address, dtype, row_stride] = argument;
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype codes are 0 to 3, got " + std::to_string(dtype));
  return {reinterpret_cast<void*>(address), static_cast<DType>(dtype), row_stride};
}

template <typename Pointer>
Pointer pointer_of(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

}  // namespace eopd
