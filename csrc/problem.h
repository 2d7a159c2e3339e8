// What every set of kernels is handed: blocks of logits and how they are transformed.
#pragma once

#include <cstdint>

namespace eopd {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A block of rows: last stride 1, any row stride (in elements), any alignment.
struct Matrix {
  void* data;  // [rows, columns]
  DType dtype;
  int64_t row_stride;
};

// z = softcap * tanh(scale * x / softcap) / temperature; softcap 0 stands for none.
struct Transform {
  double scale, softcap, temperature;
};

}  // namespace eopd
