// Dropout's keep mask from Philox4x32-7 (Salmon et al., SC 2011); layout in kernels/random.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

typedef uint64_t VecW __attribute__((vector_size(4 * PEFTDYNO_LANES)));

// 64-bit products of the even 32-bit lanes. Compilers make a 64-bit by 64-bit product of the plain form.
PEFTDYNO_INLINE VecW multiply_even(VecU a, VecU b) {
#if defined(__AVX512F__)
  return bit_cast<VecW>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecW>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<VecW>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (bit_cast<VecW>(a) & 0xffffffffull) * (bit_cast<VecW>(b) & 0xffffffffull);
#endif
}

// High and low halves of each lane's product with m.
PEFTDYNO_INLINE void multiply(VecU a, uint32_t m, VecU& high, VecU& low) {
  const VecU factor = m - VecU{};
  const VecW even = multiply_even(a, factor), odd = multiply_even(bit_cast<VecU>(bit_cast<VecW>(a) >> 32), factor);
#if defined(__AVX512F__)
  const __m512i e = bit_cast<__m512i>(even), o = bit_cast<__m512i>(odd);
  low = bit_cast<VecU>(_mm512_mask_shuffle_epi32(e, 0xaaaa, o, _MM_PERM_CCAA));
  high = bit_cast<VecU>(_mm512_mask_shuffle_epi32(o, 0x5555, e, _MM_PERM_DDBB));
#else
  low = bit_cast<VecU>((even & 0xffffffffull) | (odd << 32));
  high = bit_cast<VecU>((even >> 32) | (odd & 0xffffffff00000000ull));
#endif
}

// Four vectors of words, a counter a lane, to the words of each counter side by side. A 128-bit part of a vector
// stays where it is, so lane 4 j + i must hold counter (LANES / 4) i + j for the counters to come out in order.
struct Together {
  VecU w[4];
};

PEFTDYNO_INLINE Together transpose_words(VecU a, VecU b, VecU c, VecU d) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
#define PEFTDYNO_UNPACK(half, x, y) bit_cast<VecU>(_mm512_unpack##half(bit_cast<__m512i>(x), bit_cast<__m512i>(y)))
#elif defined(__AVX2__)
#define PEFTDYNO_UNPACK(half, x, y) bit_cast<VecU>(_mm256_unpack##half(bit_cast<__m256i>(x), bit_cast<__m256i>(y)))
#else
#define PEFTDYNO_UNPACK(half, x, y) bit_cast<VecU>(_mm_unpack##half(bit_cast<__m128i>(x), bit_cast<__m128i>(y)))
#endif
  const VecU ab_low = PEFTDYNO_UNPACK(lo_epi32, a, b), ab_high = PEFTDYNO_UNPACK(hi_epi32, a, b);
  const VecU cd_low = PEFTDYNO_UNPACK(lo_epi32, c, d), cd_high = PEFTDYNO_UNPACK(hi_epi32, c, d);
  return {{PEFTDYNO_UNPACK(lo_epi64, ab_low, cd_low), PEFTDYNO_UNPACK(hi_epi64, ab_low, cd_low),
           PEFTDYNO_UNPACK(lo_epi64, ab_high, cd_high), PEFTDYNO_UNPACK(hi_epi64, ab_high, cd_high)}};
#undef PEFTDYNO_UNPACK
#else
  const VecU words[4] = {a, b, c, d};
  Together result;
  for (int64_t i = 0; i < LANES; ++i)
    for (int64_t w = 0; w < 4; ++w) result.w[i % 4][i / 4 * 4 + w] = words[w][i];
  return result;
#endif
}

typedef uint16_t VecHalves __attribute__((vector_size(4 * PEFTDYNO_LANES)));

// A bit for each half that is not below the threshold.
PEFTDYNO_INLINE uint32_t kept_halves(VecU words, uint16_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu16_mask(bit_cast<__m512i>(words), _mm512_set1_epi16(static_cast<int16_t>(threshold)));
#else
  const VecHalves keep = bit_cast<VecHalves>(bit_cast<VecHalves>(words) >= threshold);
#if defined(__AVX2__)
  const __m256i bytes = _mm256_packs_epi16(bit_cast<__m256i>(keep), bit_cast<__m256i>(keep));
  const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  return (bits & 0xff) | (bits >> 8 & 0xff00);
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < 2 * LANES; ++i) bits |= static_cast<uint32_t>(keep[i] & 1) << i;
  return bits;
#endif
#endif
}

constexpr int64_t MASK_COLUMNS = 8 * LANES;        // columns that one draw serves
constexpr int64_t MASK_WORDS = MASK_COLUMNS / 32;  // and words of their mask

// The mask of MASK_COLUMNS columns of one token from `column`, a multiple of 8, on: 1 lets an element pass.
PEFTDYNO_INLINE void draw_mask(uint64_t stream, uint64_t key, uint16_t threshold, int64_t column, uint32_t* mask) {
  VecU c0, c1 = static_cast<uint32_t>(stream) - VecU{}, c2 = static_cast<uint32_t>(stream >> 32) - VecU{}, c3 = {};
  for (int64_t i = 0; i < LANES; ++i) c0[i] = static_cast<uint32_t>(i % 4 * (LANES / 4) + i / 4);
  c0 += static_cast<uint32_t>(column / 8);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 7; ++round) {
    VecU high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Together words = transpose_words(c0, c1, c2, c3);
  for (int64_t i = 0; i < MASK_WORDS; ++i) mask[i] = 0;
  for (int64_t i = 0; i < 4; ++i) mask[i * 2 * LANES / 32] |= kept_halves(words.w[i], threshold) << i * 2 * LANES % 32;
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
