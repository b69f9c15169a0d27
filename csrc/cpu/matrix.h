// Products of small blocks held in cache: C (+)= A B, with C in fp32.
//
// An engine fixes the type of A and B and how B lies in memory. A [M, K] is row-major. Sizes are padded: M to
// ROW_UNIT, N to 16, K to 32. `Fp32Engine` keeps B row-major; `AmxEngine` keeps pairs of B's rows interleaved, as the tile
// instructions read them.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

struct Fp32Engine {
  using Element = float;
  static constexpr int64_t ROW_UNIT = 1;  // rows of A and C come in multiples of it

  template <int ROWS, int VECTORS>
  PEFTDYNO_INLINE void tile(int64_t k_size, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                            int64_t ldc, bool accumulate) {
    Vec total[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) total[i][j] = accumulate ? load(c + i * ldc + j * LANES) : Vec{};
    for (int64_t k = 0; k < k_size; ++k)
      for (int j = 0; j < VECTORS; ++j) {
        Vec column = load(b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; ++i) total[i][j] += a[i * lda + k] * column;
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
    constexpr int ROWS = LANES == 16 ? 8 : 4;
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
      tile<ROWS, VECTORS>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; ++i) tile<1, VECTORS>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }

  // Two rows of B, LANES columns of them.
  PEFTDYNO_INLINE void store_pair(float* b, int64_t ldb, int64_t row, int64_t column, Vec even, Vec odd) {
    store(b + row * ldb + column, even);
    store(b + (row + 1) * ldb + column, odd);
  }

  template <class T>
  static void pack_rows(const T* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, float* b, const uint16_t* masks = nullptr, int64_t mask_stride = 0) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        Vec v = r < num_rows && i < width ? load_upto(rows[r] + i, width - i) : Vec{};
        if (masks != nullptr) v = masked(v, masks + r * mask_stride + i);
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

  static void begin() {}
  static void end() {}
};

#if defined(__AMX_BF16__)

struct AmxEngine {
  using Element = bfloat16;
  static constexpr int64_t ROW_UNIT = 16;

  struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  static void begin() {
    const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
  }
  static void end() { _tile_release(); }

  // A block of C of 16 * ROWS rows and 16 * COLUMNS columns in tiles 0 to 3; ROWS and COLUMNS are 1 or 2.
  template <int ROWS, int COLUMNS>
  PEFTDYNO_INLINE void tiles(int64_t k_size, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb, float* c,
                             int64_t ldc, bool accumulate) {
    float* below = c + 16 * ldc;
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      if (COLUMNS == 2) _tile_loadd(1, c + 16, ldc * 4);
      if (ROWS == 2) _tile_loadd(2, below, ldc * 4);
      if (ROWS * COLUMNS == 4) _tile_loadd(3, below + 16, ldc * 4);
    } else {
      _tile_zero(0);
      if (COLUMNS == 2) _tile_zero(1);
      if (ROWS == 2) _tile_zero(2);
      if (ROWS * COLUMNS == 4) _tile_zero(3);
    }
    for (int64_t k = 0; k < k_size; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, b + k * ldb, ldb * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (COLUMNS == 2) {
        _tile_loadd(7, b + k * ldb + 32, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (ROWS == 2) {
        _tile_loadd(5, a + 16 * lda + k, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (ROWS * COLUMNS == 4) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    if (COLUMNS == 2) _tile_stored(1, c + 16, ldc * 4);
    if (ROWS == 2) _tile_stored(2, below, ldc * 4);
    if (ROWS * COLUMNS == 4) _tile_stored(3, below + 16, ldc * 4);
  }

  template <int ROWS>
  PEFTDYNO_INLINE void tile_rows(int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                                 float* c, int64_t ldc, bool accumulate) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) tiles<ROWS, 2>(k, a, lda, b + 2 * j, ldb, c + j, ldc, accumulate);
    if (j < n) tiles<ROWS, 1>(k, a, lda, b + 2 * j, ldb, c + j, ldc, accumulate);
  }

  // `ldb` counts the columns of B; a row of the interleaved form holds 2 ldb elements.
  static void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    int64_t i = 0;
    for (; i + 32 <= m; i += 32) tile_rows<2>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) tile_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }

  PEFTDYNO_INLINE void store_pair(bfloat16* b, int64_t ldb, int64_t row, int64_t column, Vec even, Vec odd) {
    VecU low = __builtin_convertvector(narrow(even), VecU), high = __builtin_convertvector(narrow(odd), VecU);
    VecU pairs = low | (high << 16);
    __builtin_memcpy(b + row * ldb + 2 * column, &pairs, sizeof pairs);
  }

  static void pack_rows(const bfloat16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, bfloat16* b, const uint16_t* masks = nullptr, int64_t mask_stride = 0) {
    for (int64_t r = 0; r < padded_rows; r += 2)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        const bool whole = r + 1 < num_rows && i + LANES <= width;
        VecH even = whole ? load_bits(rows[r] + i) : bits(rows, r, num_rows, i, width);
        VecH odd = whole ? load_bits(rows[r + 1] + i) : bits(rows, r + 1, num_rows, i, width);
        if (masks != nullptr) {
          even &= load_mask(masks + r * mask_stride + i);
          odd &= load_mask(masks + (r + 1) * mask_stride + i);
        }
        VecU pairs = __builtin_convertvector(even, VecU) | (__builtin_convertvector(odd, VecU) << 16);
        __builtin_memcpy(b + r * padded_width + 2 * i, &pairs, sizeof pairs);
      }
  }

  static void pack_transposed(const bfloat16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                              int64_t padded_width, bfloat16* b) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        VecH v = r < num_rows && i + LANES <= width ? load_bits(rows[r] + i) : bits(rows, r, num_rows, i, width);
        uint32_t pairs[LANES / 2];
        __builtin_memcpy(pairs, &v, sizeof v);
        for (int64_t lane = 0; lane < LANES / 2; ++lane)
          __builtin_memcpy(b + (i + 2 * lane) * padded_rows + 2 * r, &pairs[lane], 4);
      }
  }

 private:
  PEFTDYNO_INLINE VecH load_bits(const bfloat16* p) {
    VecH v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  // The same where rows or columns may be missing: those read as zero.
  static VecH bits(const bfloat16* const* rows, int64_t r, int64_t num_rows, int64_t i, int64_t width) {
    VecH v = {};
    if (r >= num_rows) return v;
    for (int64_t j = 0; j < LANES && i + j < width; ++j) v[j] = rows[r][i + j].bits;
    return v;
  }
};

#endif

// The engine for activations of a type.
template <class T>
struct EngineOf {
  using type = Fp32Engine;
};

#if defined(__AMX_BF16__)
template <>
struct EngineOf<bfloat16> {
  using type = AmxEngine;
};
#endif

static int64_t operand_bytes(bool bf16) {
  return bf16 ? sizeof(EngineOf<bfloat16>::type::Element) : sizeof(EngineOf<float>::type::Element);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
