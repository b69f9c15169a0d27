// Products of small blocks held in cache: C (+)= A B, with C in fp32.
//
// An engine fixes the type of A and B and how B lies in memory. A [M, K] is row-major. Sizes are padded: M to
// ROW_UNIT, N and K to 32. `Fp32Engine` keeps B row-major; `AmxEngine` keeps pairs of B's rows interleaved, as the tile
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
    constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 2;
    for (int64_t j = 0; j < n; j += VECTORS * LANES) {
      int64_t i = 0;
      for (; i + ROWS <= m; i += ROWS)
        tile<ROWS, VECTORS>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
      for (; i < m; ++i) tile<1, VECTORS>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
    }
  }

  // Two rows of B, LANES columns of them.
  PEFTDYNO_INLINE void store_pair(float* b, int64_t ldb, int64_t row, int64_t column, Vec even, Vec odd) {
    store(b + row * ldb + column, even);
    store(b + (row + 1) * ldb + column, odd);
  }

  template <class T>
  static void pack_rows(const T* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, float* b) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES)
        store(b + r * padded_width + i, r < num_rows && i < width ? load_upto(rows[r] + i, width - i) : Vec{});
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

  // One 16 x 16 block of C in tile 0.
  PEFTDYNO_INLINE void tile_16x16(int64_t k_size, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                                  float* c, int64_t ldc, bool accumulate) {
    if (accumulate)
      _tile_loadd(0, c, ldc * 4);
    else
      _tile_zero(0);
    for (int64_t k = 0; k < k_size; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, b + k * ldb, ldb * 4);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, c, ldc * 4);
  }

  // Four blocks of C in tiles 0 to 3.
  PEFTDYNO_INLINE void tile_32x32(int64_t k_size, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                                  float* c, int64_t ldc, bool accumulate) {
    float* below = c + 16 * ldc;
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
      _tile_loadd(2, below, ldc * 4);
      _tile_loadd(3, below + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < k_size; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, b + k * ldb, ldb * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + k * ldb + 32, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * lda + k, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, below, ldc * 4);
    _tile_stored(3, below + 16, ldc * 4);
  }

  // `ldb` counts the columns of B; a row of the interleaved form holds 2 ldb elements.
  static void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    int64_t i = 0;
    for (; i + 32 <= m; i += 32)
      for (int64_t j = 0; j < n; j += 32)
        tile_32x32(k, a + i * lda, lda, b + 2 * j, ldb, c + i * ldc + j, ldc, accumulate);
    if (i < m)
      for (int64_t j = 0; j < n; j += 16)
        tile_16x16(k, a + i * lda, lda, b + 2 * j, ldb, c + i * ldc + j, ldc, accumulate);
  }

  PEFTDYNO_INLINE void store_pair(bfloat16* b, int64_t ldb, int64_t row, int64_t column, Vec even, Vec odd) {
    VecU low = __builtin_convertvector(narrow(even), VecU), high = __builtin_convertvector(narrow(odd), VecU);
    VecU pairs = low | (high << 16);
    __builtin_memcpy(b + row * ldb + 2 * column, &pairs, sizeof pairs);
  }

  static void pack_rows(const bfloat16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, bfloat16* b) {
    for (int64_t r = 0; r < padded_rows; r += 2)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        VecH even = bits(rows, r, num_rows, i, width), odd = bits(rows, r + 1, num_rows, i, width);
        VecU pairs = __builtin_convertvector(even, VecU) | (__builtin_convertvector(odd, VecU) << 16);
        __builtin_memcpy(b + r * padded_width + 2 * i, &pairs, sizeof pairs);
      }
  }

  static void pack_transposed(const bfloat16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                              int64_t padded_width, bfloat16* b) {
    for (int64_t r = 0; r < padded_rows; ++r)
      for (int64_t i = 0; i < padded_width; i += LANES) {
        VecH v = bits(rows, r, num_rows, i, width);
        uint32_t pairs[LANES / 2];
        __builtin_memcpy(pairs, &v, sizeof v);
        for (int64_t lane = 0; lane < LANES / 2; ++lane)
          __builtin_memcpy(b + (i + 2 * lane) * padded_rows + 2 * r, &pairs[lane], 4);
      }
  }

 private:
  PEFTDYNO_INLINE VecH bits(const bfloat16* const* rows, int64_t r, int64_t num_rows, int64_t i, int64_t width) {
    VecH v = {};
    if (r >= num_rows || i >= width) return v;
    const int64_t count = width - i < LANES ? width - i : LANES;
    bfloat16 buffer[LANES] = {};
    if (count == LANES) {
      __builtin_memcpy(&v, rows[r] + i, sizeof v);
      return v;
    }
    for (int64_t j = 0; j < count; ++j) buffer[j] = rows[r][i + j];
    __builtin_memcpy(&v, buffer, sizeof v);
    return v;
  }
};

#endif

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
