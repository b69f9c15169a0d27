// Products of small blocks held in cache: C (+)= A B, with C in fp32.
//
// An engine fixes the type of A and B and how B lies in memory. A [M, K] is row-major. Sizes are padded: M to
// ROW_UNIT, N to 16, K to 32. `Fp32Engine` keeps B row-major; `AmxEngine` keeps pairs of B's rows interleaved, as the tile
// instructions read them.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

// target [LANES, LANES] = source^T, in 32-bit elements; strides in elements.
PEFTDYNO_INLINE void transpose_square(const uint32_t* source, int64_t stride, uint32_t* target, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512i row[16], pair[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(source + i * stride);
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88), high = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    _mm512_storeu_si512(target + i * to_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(target + (i + 4) * to_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(target + (i + 8) * to_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(target + (i + 12) * to_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
#else
  for (int64_t i = 0; i < LANES; ++i)
    for (int64_t j = 0; j < LANES; ++j) target[j * to_stride + i] = source[i * stride + j];
#endif
}

// target [columns, rows] = source [rows, columns]^T in 32-bit elements; rows and columns are multiples of 16.
static void transpose_words(const void* source, int64_t rows, int64_t columns, int64_t stride, void* target) {
  const uint32_t* from = static_cast<const uint32_t*>(source);
  uint32_t* to = static_cast<uint32_t*>(target);
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) transpose_square(from + i * stride + j, stride, to + j * rows + i, rows);
}

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

#if defined(PEFTDYNO_TILES)

struct AmxEngine {
  using Element = bfloat16;
  static constexpr int64_t ROW_UNIT = 16;

  struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64};  // of four tiles; the others stay free
    uint8_t rows[16] = {16, 16, 16, 16};
  };

  static void begin() {
    const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
  }
  static void end() { _tile_release(); }

  // A block of C of 16 rows and 16 * COLUMNS columns. Two sums and two operands: more tiles in use can cost more time
  // than they save loads (docs/decisions/cpu-products.md).
  template <int COLUMNS>
  PEFTDYNO_INLINE void tiles(int64_t k_size, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb, float* c,
                             int64_t ldc, bool accumulate) {
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      if (COLUMNS == 2) _tile_loadd(1, c + 16, ldc * 4);
    } else {
      _tile_zero(0);
      if (COLUMNS == 2) _tile_zero(1);
    }
    for (int64_t k = 0; k < k_size; k += 32) {
      _tile_loadd(2, a + k, lda * 2);
      _tile_loadd(3, b + k * ldb, ldb * 4);
      _tile_dpbf16ps(0, 2, 3);
      if (COLUMNS == 1) continue;
      _tile_loadd(3, b + k * ldb + 32, ldb * 4);
      _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(0, c, ldc * 4);
    if (COLUMNS == 2) _tile_stored(1, c + 16, ldc * 4);
  }

  // `ldb` counts the columns of B; a row of the interleaved form holds 2 ldb elements.
  static void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b,
                       int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t i = 0; i < m; i += 16) {
        float* block = c + i * ldc + j;
        if (j + 32 <= n)
          tiles<2>(k, a + i * lda, lda, b + 2 * j, ldb, block, ldc, accumulate);
        else
          tiles<1>(k, a + i * lda, lda, b + 2 * j, ldb, block, ldc, accumulate);
      }
  }

  PEFTDYNO_INLINE void store_pair(bfloat16* right, bfloat16* left, int64_t stride, int64_t row, int64_t column,
                                  Vec even, Vec odd) {
    const __m512i apart = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
    _mm512_storeu_si512(right + row * stride + 2 * column, _mm512_permutexvar_epi16(interleaving(), apart));
    if (left == nullptr) return;
    bfloat16* to = left + row * stride + column;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(apart));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride), _mm512_extracti64x4_epi64(apart, 1));
  }

  // 0 16 1 17 ...: the order that lays two halves of a register side by side.
  PEFTDYNO_INLINE __m512i interleaving() {
    VecU order;
    for (int64_t i = 0; i < LANES; ++i) order[i] = static_cast<uint32_t>(i | (i + LANES) << 16);
    return bit_cast<__m512i>(order);
  }

  static void pack_rows(const bfloat16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t width,
                        int64_t padded_width, bfloat16* b, const uint32_t* masks = nullptr, int64_t mask_stride = 0) {
    constexpr int64_t AHEAD = 16;  // rows, which lie too far apart for the processor to ask for them by itself
    for (int64_t r = 0; r < padded_rows; r += 2)
      for (int64_t i = 0; i < padded_width; i += 2 * LANES) {
        ask_for(rows[smaller(r + AHEAD, num_rows - 1)] + i);
        ask_for(rows[smaller(r + AHEAD + 1, num_rows - 1)] + i);
        const __mmask32 inside = width - i >= 2 * LANES ? ~0u : i < width ? (1u << (width - i)) - 1 : 0u;
        __mmask32 even = r < num_rows ? inside : 0u, odd = r + 1 < num_rows ? inside : 0u;
        if (masks != nullptr) {
          even &= mask_bits(masks + smaller(r, num_rows - 1) * mask_stride, i);
          odd &= mask_bits(masks + smaller(r + 1, num_rows - 1) * mask_stride, i);
        }
        const __m512i upper = _mm512_maskz_loadu_epi16(even, rows[smaller(r, num_rows - 1)] + i);
        const __m512i lower = _mm512_maskz_loadu_epi16(odd, rows[smaller(r + 1, num_rows - 1)] + i);
        bfloat16* to = b + r * padded_width + 2 * i;
        _mm512_storeu_si512(to, interleaved_low(upper, lower));
        _mm512_storeu_si512(to + 32, interleaved_high(upper, lower));
      }
  }

  // The 16-bit elements of two registers, one of each in turn: their first halves and their last.
  PEFTDYNO_INLINE __m512i interleaved_low(__m512i even, __m512i odd) {
    VecU order;  // 0 32 1 33 ...
    for (int64_t i = 0; i < LANES; ++i) order[i] = static_cast<uint32_t>(i | (i + 32) << 16);
    return _mm512_permutex2var_epi16(even, bit_cast<__m512i>(order), odd);
  }
  PEFTDYNO_INLINE __m512i interleaved_high(__m512i even, __m512i odd) {
    VecU order;  // 16 48 17 49 ...
    for (int64_t i = 0; i < LANES; ++i) order[i] = static_cast<uint32_t>((i + 16) | (i + 48) << 16);
    return _mm512_permutex2var_epi16(even, bit_cast<__m512i>(order), odd);
  }

  static void right(const bfloat16* from, int64_t rows, int64_t width, bfloat16* b) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < width; i += LANES) {
        const VecU even = extend(load_bits(from + r * width + i));
        const VecU pairs = even | (extend(load_bits(from + (r + 1) * width + i)) << 16);
        __builtin_memcpy(b + r * width + 2 * i, &pairs, sizeof pairs);
      }
  }
  static void right_transposed(const bfloat16* from, int64_t rows, int64_t width, bfloat16* b) {
    transpose_words(from, rows, width / 2, width / 2, b);
  }
  static void left_transposed(const bfloat16* from, int64_t rows, int64_t width, bfloat16* a, bfloat16* spare) {
    right(from, rows, width, spare);
    transpose_words(spare, rows / 2, width, width, a);
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

#if defined(PEFTDYNO_TILES)
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
