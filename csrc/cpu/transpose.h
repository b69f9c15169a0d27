// Transposes of blocks held in cache, in 32-bit elements.
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
#elif defined(__AVX2__)
  __m256 row[8], pair[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(source) + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    float* to = reinterpret_cast<float*>(target) + i * to_stride;
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(to + 4 * to_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
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

// The sum of each of the LANES rows of [LANES, LANES]: halves of rows are laid beside each other and added, again and
// again.
PEFTDYNO_INLINE Vec row_sums(const float* rows) {
#if defined(__AVX512F__)
  __m512 v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_ps(rows + i * 16);
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(v[2 * i]), odd = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  for (int n = 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
      v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return bit_cast<Vec>(v[0]);
#elif defined(__AVX2__)
  __m256 v[8];
  for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(rows + i * 8);
  for (int n = 4; n > 1; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
  return bit_cast<Vec>(_mm256_add_ps(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31)));
#else
  Vec sums;
  for (int64_t i = 0; i < LANES; ++i) sums[i] = sum(load(rows + i * LANES));
  return sums;
#endif
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
