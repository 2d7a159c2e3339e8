// Products of bfloat16 matrices on AVX512_BF16, whose VDPBF16PS adds 32 products to 16 sums of float32.
//
// Pairs of neighbours along the depth are 32 bits. The right matrix is copied a panel of 48 columns at a time, so that
// the pairs of 16 columns fill a register. Of the left one a tile takes 8 rows, a pair of each in all lanes of another.
// A left matrix whose pairs do not lie side by side is copied too.
//
// Gflop/s of CPU time, best of nine, one core of an AMD EPYC (Zen 4) that others use, torch 2.13, V = 8,192: for logits, the
// hidden states' gradient and the weight's, the last two added to what is there
//   1,024 tokens of D = 576:  193, 199, 191; torch.mm in and out of bfloat16 204, 204, 210, in float32 92, 101, 101
//   128 tokens of D = 1,024:  177, 179, 145;                                 194, 191, 197,             73,  88,  96
#include "products.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// GCC takes its own intrinsics for reads of what was not written (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace eopd::cpu {
namespace {

constexpr int WIDTH = 16;                // pairs, and sums, in a register
constexpr int VECTORS = 3;               // of a panel
constexpr int COLUMNS = WIDTH * VECTORS;
constexpr int ROWS = 8;                  // of a tile: with 3 vectors 24 sums, 3 of the panel and one pair of 32 registers
constexpr int64_t DEPTH = 512;           // of a panel, 48 KiB, which stays in the second cache while all rows meet it
constexpr int64_t SLICE = 4096;          // of the depth, where the left matrix would be read anew for every panel
constexpr int64_t MOST_ROWS = 1024;      // of a task, and of one whose left matrix is copied: 288 KiB
constexpr int64_t MOST_COPIED_ROWS = 288;
constexpr int64_t MOST_COLUMNS = 16 * COLUMNS;
constexpr int64_t FEWEST_ROWS = 12 * ROWS;  // fewer, and copying a panel shows
constexpr int64_t WORTH_A_THREAD = 1 << 21;  // products: 20 microseconds of a core

constexpr int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }
constexpr int64_t whole(int64_t size, int64_t part) { return parts(size, part) * part; }

template <int value>
using Constant = std::integral_constant<int, value>;

template <typename Value>
inline Value read(const char* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

constexpr __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// from [depth, width], contiguous rows -> to [depth / 2, pitch] of pairs, the last one with 0 where the depth is odd.
void copy_rows(const uint16_t* from, int64_t row_stride, int64_t depth, int64_t width, int64_t pitch, uint32_t* to) {
  for (int64_t p = 0; p < depth; p += 2, from += 2 * row_stride, to += pitch) {
    for (int64_t j = 0; j < width; j += WIDTH) {
      const __mmask16 mask = first_lanes(std::min<int64_t>(WIDTH, width - j));
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + j));
      const __mmask16 second = p + 1 < depth ? mask : 0;
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + row_stride + j));
      _mm512_storeu_si512(to + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// 16 registers of 16 pairs, transposed in four steps.
void transpose(__m512i rows[WIDTH]) {
  __m512i other[WIDTH];
  for (int i = 0; i < WIDTH; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < WIDTH; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < WIDTH / 2; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// from [width, depth], contiguous rows -> to [depth / 2, COLUMNS] of pairs.
void copy_transposed(const uint16_t* from, int64_t row_stride, int64_t depth, int64_t width, uint32_t* to) {
  for (int64_t p = 0; p < depth; p += 2 * WIDTH) {
    const int64_t left = std::min<int64_t>(2 * WIDTH, depth - p);
    const __mmask32 mask = left == 2 * WIDTH ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
    for (int64_t j = 0; j < width; j += WIDTH) {
      __m512i rows[WIDTH];
      for (int i = 0; i < WIDTH; ++i)
        rows[i] = j + i < width ? _mm512_maskz_loadu_epi16(mask, from + (j + i) * row_stride + p) : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t q = 0; 2 * q < left; ++q) _mm512_storeu_si512(to + (p / 2 + q) * COLUMNS + j, rows[q]);
    }
  }
}

// Pairs of the left matrix, a row each: the bytes from one row to the next, and from one pair of a row to the next.
struct Pairs {
  const char* data;
  int64_t row_step, step;
};

// The product of `rows` rows of the left matrix and a panel, `vectors` wide. With `odd` there is one element more of each
// row, the first half of a pair whose second is not read.
template <int rows, int vectors>
inline void add_tile(const Pairs& left, const uint32_t* panel, int64_t pairs, bool odd, float* out, int64_t out_row_stride,
                     __mmask16 last, bool add) {
  __m512 sums[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sums[i][v] = _mm512_setzero_ps();
  const char* from[rows];
  for (int i = 0; i < rows; ++i) from[i] = left.data + i * left.row_step;
  const auto add_products = [&](int i, int32_t pair, const __m512bh* right) {
    for (int v = 0; v < vectors; ++v)
      sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)_mm512_set1_epi32(pair), right[v]);
  };
  int64_t at = 0;
  for (int64_t p = 0; p < pairs + odd; ++p, at += left.step, panel += COLUMNS) {
    __m512bh right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(panel + WIDTH * v);
    if (p < pairs) {
      for (int i = 0; i < rows; ++i) add_products(i, read<int32_t>(from[i] + at), right);
    } else {
      for (int i = 0; i < rows; ++i) add_products(i, read<uint16_t>(from[i] + at), right);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 mask = v + 1 < vectors ? __mmask16(0xffff) : last;
      float* to = out + i * out_row_stride + WIDTH * v;
      const __m512 sum = add ? _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(mask, to)) : sums[i][v];
      _mm512_mask_storeu_ps(to, mask, sum);
    }
  }
}

struct alignas(64) Line {
  uint32_t pairs[WIDTH];
};

// What a thread copies into.
struct Copies {
  uint32_t* panel;  // [DEPTH / 2, COLUMNS]
  uint32_t* left;   // [DEPTH / 2, rows of a task]; null where the left matrix is read as it is
};

// Rows [row, row_end) and columns [column, column_end) of the product, over the depth [first, end).
void one_task(const Product& product, const Copies& copies, int64_t row, int64_t row_end, int64_t column,
              int64_t column_end, int64_t first, int64_t end) {
  const Operand &left = product.left, &right = product.right;
  const int64_t pitch = whole(row_end - row, WIDTH);
  const int64_t row_step = copies.left ? sizeof(uint32_t) : sizeof(uint16_t) * left.row_stride;
  const int64_t step = sizeof(uint32_t) * (copies.left ? pitch : 1);
  for (int64_t start = first; start < end; start += DEPTH) {
    const int64_t depth = std::min(DEPTH, end - start);
    const bool add = product.add || start > 0;
    if (copies.left) {
      const uint16_t* from = left.data + row * left.row_stride + start * left.column_stride;
      copy_rows(from, left.column_stride, depth, row_end - row, pitch, copies.left);
    }
    const bool odd = !copies.left && depth % 2 != 0;
    const int64_t pairs = copies.left ? (depth + 1) / 2 : depth / 2;
    for (int64_t j = column; j < column_end; j += COLUMNS) {
      const int64_t width = std::min<int64_t>(COLUMNS, column_end - j);
      const uint16_t* from = right.data + start * right.row_stride + j * right.column_stride;
      if (right.column_stride == 1) {
        copy_rows(from, right.row_stride, depth, width, COLUMNS, copies.panel);
      } else {
        copy_transposed(from, right.column_stride, depth, width, copies.panel);
      }
      const __mmask16 last = first_lanes((width - 1) % WIDTH + 1);
      int64_t i = row;
      const auto tiles = [&](auto rows, auto vectors) {
        for (; i + rows <= row_end; i += rows) {
          const void* from = copies.left ? static_cast<const void*>(copies.left + i - row)
                                         : left.data + i * left.row_stride + start;
          const Pairs of_left{static_cast<const char*>(from), row_step, step};
          add_tile<rows, vectors>(of_left, copies.panel, pairs, odd, product.out + i * product.out_row_stride + j,
                                  product.out_row_stride, last, add);
        }
      };
      const auto all_tiles = [&](auto vectors) {
        tiles(Constant<ROWS>(), vectors);
        tiles(Constant<ROWS / 2>(), vectors);
        tiles(Constant<1>(), vectors);
      };
      if (width > 2 * WIDTH) all_tiles(Constant<3>());
      else if (width > WIDTH) all_tiles(Constant<2>());
      else all_tiles(Constant<1>());
    }
  }
}

}  // namespace

void multiply_bfloat16(const Product& product) {
  const int64_t rows = product.rows, columns = product.columns, depth = product.depth;
  if (depth == 0 && !product.add)
    for (int64_t i = 0; i < rows; ++i) std::memset(product.out + i * product.out_row_stride, 0, columns * sizeof(float));
  if (rows == 0 || columns == 0 || depth == 0) return;

  const bool copied = product.left.column_stride != 1;
  const int64_t task_columns = copied ? MOST_COLUMNS : COLUMNS;
  const int64_t worth = rows * columns / WORTH_A_THREAD * depth + rows * columns % WORTH_A_THREAD * depth / WORTH_A_THREAD;
  const int threads = static_cast<int>(std::clamp<int64_t>(worth, 1, product.threads));
  int64_t task_rows = std::min(whole(rows, ROWS), copied ? MOST_COPIED_ROWS : MOST_ROWS);
  while (task_rows > FEWEST_ROWS && parts(rows, task_rows) * parts(columns, task_columns) < 4 * threads)
    task_rows = whole(task_rows / 2, ROWS);
  const int64_t tasks_down = parts(rows, task_rows), tasks = tasks_down * parts(columns, task_columns);
  const int64_t slice = !copied && depth > columns ? SLICE : depth;

  const int64_t panel_lines = DEPTH / 2 * VECTORS;
  const int64_t lines = panel_lines + (copied ? DEPTH / 2 * parts(task_rows, WIDTH) : 0);
  std::vector<Line> memory(lines * threads);  // here, as nothing among the threads may throw
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    Line* own = memory.data() + lines * omp_get_thread_num();
#else
    Line* own = memory.data();
#endif
    const Copies copies{own->pairs, copied ? own[panel_lines].pairs : nullptr};
    for (int64_t first = 0; first < depth; first += slice) {
      const int64_t end = std::min(depth, first + slice);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t row = task % tasks_down * task_rows, column = task / tasks_down * task_columns;
        one_task(product, copies, row, std::min(rows, row + task_rows), column, std::min(columns, column + task_columns),
                 first, end);
      }
    }
  }
}

}  // namespace eopd::cpu
