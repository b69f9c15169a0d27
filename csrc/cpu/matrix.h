// Products of small blocks held in cache: C (+)= A B, with C in fp32.
//
// An engine fixes the type of A and B and how B lies in memory. A [M, K] is row-major. Sizes are padded: M and N to 16, K
// to 32. `Fp32Engine` keeps B row-major; `PairEngine`, where the processor multiplies bf16, keeps pairs of B's rows
// interleaved.
#pragma once

#include "pair_block.h"
#include "pair_layout.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

struct Fp32Engine {
  using Element = float;

  template <int ROWS, int VECTORS>
  PEFTDYNO_INLINE void tile(int64_t k_size, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                            int64_t ldc, bool accumulate) {
    Vec total[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) total[i][j] = accumulate ? load(c + i * ldc + j * LANES) : Vec{};
    for (int64_t k = 0; k < k_size; ++k) {
      Vec columns[VECTORS];
      for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + k * ldb + j * LANES);
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) total[i][j] += a[i * lda + k] * columns[j];
    }
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * LANES, total[i][j]);
  }

  static void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc, bool accumulate) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) columns<2>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    for (; j < n; j += LANES) columns<1>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  }

  template <int VECTORS>
  PEFTDYNO_INLINE void columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                               int64_t ldc, bool accumulate) {
    constexpr int ROWS = LANES == 16 ? 8 : LANES == 8 ? 6 : 4;  // as many as registers hold
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
      tile<ROWS, VECTORS>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    if constexpr (ROWS > 4)
      for (; i + 4 <= m; i += 4) tile<4, VECTORS>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; ++i) tile<1, VECTORS>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }

  // LANES columns of two rows of a right operand [rows, stride] and, where not null, of a left one.
  PEFTDYNO_INLINE void store_pair(float* right, float* left, int64_t stride, int64_t row, int64_t column, Vec even,
                                  Vec odd) {
    store(right + row * stride + column, even);
    store(right + (row + 1) * stride + column, odd);
    if (left == nullptr) return;
    store(left + row * stride + column, even);
    store(left + (row + 1) * stride + column, odd);
  }

  template <class T>
  static void pack_rows(const T* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, float* b, const uint32_t* masks = nullptr, int64_t mask_stride = 0) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        Vec v = r < num_rows && i < width ? load_upto(rows[r] + i, width - i) : Vec{};
        if (masks != nullptr && r < num_rows) v = masked(v, mask_bits(masks + r * mask_stride, i));
        store(b + r * padded_width + i, v);
      }
  }

  template <class T>
  static void pack_transposed(const T* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                              int64_t padded_width, float* b) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        Vec v = r < num_rows && i < width ? load_upto(rows[r] + i, width - i) : Vec{};
        for (int64_t lane = 0; lane < LANES; ++lane) b[(i + lane) * padded_rows + r] = v[lane];
      }
  }

  // From whole padded rows [rows, width]: the rows as a right operand; their transpose [width, rows] as a right operand;
  // and as a left operand. `spare` holds as much as the rows.
  static void right(const float* from, int64_t rows, int64_t width, float* b) {
    __builtin_memcpy(b, from, rows * width * sizeof(float));
  }
  static void right_transposed(const float* from, int64_t rows, int64_t width, float* b) {
    transpose_words(from, rows, width, width, b);
  }
  static void left_transposed(const float* from, int64_t rows, int64_t width, float* a, float*) {
    transpose_words(from, rows, width, width, a);
  }

  static void begin() {}
  static void end() {}
};

#if defined(PEFTDYNO_PAIRS)

struct PairEngine : PairLayout {
  // `ldb` counts the columns of B; a row of the interleaved form holds 2 ldb elements.
  static void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t i = 0; i < m; i += PAIR_ROWS) {
        const BlockFactors factors{k, {a + i * lda, 2 * lda, 32}, {b + 2 * j, 4 * ldb, 32, 32 * ldb}};
        const BlockSums sums{c + i * ldc + j, ldc, 16};
        j + 32 <= n ? block<2>(factors, sums, accumulate) : block<1>(factors, sums, accumulate);
      }
  }

  static void begin() { begin_blocks(); }
  static void end() { end_blocks(); }

 private:
  template <int COLUMNS>
  PEFTDYNO_INLINE void block(const BlockFactors& factors, const BlockSums& sums, bool accumulate) {
    PairBlock<COLUMNS> one(sums, PAIR_ROWS, accumulate);
    one.add(factors, [] {});
    one.end();
  }
};

#endif

// The engine for activations of a type.
template <class T>
struct EngineOf {
  using type = Fp32Engine;
};

#if defined(PEFTDYNO_PAIRS)
template <>
struct EngineOf<bfloat16> {
  using type = PairEngine;
};
#endif

static int64_t operand_bytes(bool bf16) {
  return bf16 ? sizeof(EngineOf<bfloat16>::type::Element) : sizeof(EngineOf<float>::type::Element);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
