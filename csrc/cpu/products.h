// Products of bfloat16 matrices whose result is float32.
#pragma once

#include <cstdint>

namespace eopd::cpu {

// A matrix that is read: either stride may be 1, and one of the two is.
struct Operand {
  const uint16_t* data;
  int64_t row_stride, column_stride;  // in elements
};

struct Product {
  Operand left, right;     // [rows, depth], [depth, columns], bfloat16
  float* out;              // [rows, columns], contiguous rows
  int64_t out_row_stride;  // in elements
  int64_t rows, columns, depth;
  bool add;  // to what is in out, which is otherwise written, whatever was there
  int threads;
};

// The products of the elements are exact, and their sum is one of float32. For processors with AVX512_BF16.
void multiply_bfloat16(const Product& product);

}  // namespace eopd::cpu
