// Operands of bf16 products, as tiles and dot products read them: pairs of the right factor's rows are interleaved.
#pragma once

#include "transpose.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

#if defined(PEFTDYNO_PAIRS)

struct PairLayout {
  using Element = bfloat16;

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

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
