// Weights in 4 bits to dense ones; layout in kernels/nf4.py.
//
// The 16 products of the codebook and a block's absolute maximum are formed once, rounded once, and looked up.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

struct alignas(64) Table16 {
  uint32_t values[16];
};

// Entries of a table; bits 4 and up of an index are ignored.
PEFTDYNO_INLINE VecU look_up(const Table16& table, VecU index) {
#if defined(__AVX512F__)
  return bit_cast<VecU>(_mm512_permutexvar_epi32(bit_cast<__m512i>(index), _mm512_load_si512(table.values)));
#elif defined(__AVX2__)
  const float* values = reinterpret_cast<const float*>(table.values);
  const __m256i i = bit_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(values), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(values + 8), i);
  return bit_cast<VecU>(_mm256_blendv_ps(low, high, bit_cast<__m256>(index << 28)));
#else
  VecU found;
  for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = table.values[index[lane] & 15];
  return found;
#endif
}

// LANES bytes, one a lane.
PEFTDYNO_INLINE VecU bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return bit_cast<VecU>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<VecU>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecU v;
  for (int64_t lane = 0; lane < LANES; ++lane) v[lane] = p[lane];
  return v;
#endif
}

// Two vectors, the lanes of one between those of the other.
PEFTDYNO_INLINE void store_interleaved(VecU even, VecU odd, float* to) {
#if defined(__AVX512F__)
  const __m512i a = bit_cast<__m512i>(even), b = bit_cast<__m512i>(odd);
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(a, first, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi32(a, second, b));
#elif defined(__AVX2__)
  const __m256i low = _mm256_unpacklo_epi32(bit_cast<__m256i>(even), bit_cast<__m256i>(odd));
  const __m256i high = _mm256_unpackhi_epi32(bit_cast<__m256i>(even), bit_cast<__m256i>(odd));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_permute2x128_si256(low, high, 0x31));
#else
  uint32_t pairs[2 * LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) {
    pairs[2 * lane] = even[lane];
    pairs[2 * lane + 1] = odd[lane];
  }
  __builtin_memcpy(to, pairs, sizeof pairs);
#endif
}

// A block's values in fp32.
PEFTDYNO_INLINE Table16 block_values(const float* codebook, float absmax) {
  Table16 table;
  for (int64_t i = 0; i < 16; i += LANES) {
    const Vec v = load(codebook + i) * absmax;
    __builtin_memcpy(table.values + i, &v, sizeof v);
  }
  return table;
}

static void nf4_rows(const Nf4Dequantise& a, int64_t block, float* to) {
  const Table16 table = block_values(a.codebook, a.absmax[block]);
  const uint8_t* codes = a.codes + block * (NF4_BLOCK / 2);
  for (int64_t i = 0; i < NF4_BLOCK / 2; i += LANES) {
    const VecU pair = bytes(codes + i);
    store_interleaved(look_up(table, pair >> 4), look_up(table, pair), to + 2 * i);
  }
}

// Two elements share a lane: the first, from the high half of a byte, lies in the low half of the lane.
static void nf4_rows(const Nf4Dequantise& a, int64_t block, bfloat16* to) {
  const Table16 wide = block_values(a.codebook, a.absmax[block]);
  Table16 first, second;
  for (int64_t i = 0; i < 16; i += LANES) {
    const VecU upper = rounded_bits(load(reinterpret_cast<const float*>(wide.values) + i)) >> 16, shifted = upper << 16;
    __builtin_memcpy(first.values + i, &upper, sizeof upper);
    __builtin_memcpy(second.values + i, &shifted, sizeof shifted);
  }
  const uint8_t* codes = a.codes + block * (NF4_BLOCK / 2);
  for (int64_t i = 0; i < NF4_BLOCK / 2; i += LANES) {
    const VecU pair = bytes(codes + i);
    const VecU both = look_up(first, pair >> 4) | look_up(second, pair);
    __builtin_memcpy(to + 2 * i, &both, sizeof both);
  }
}

static void nf4_dequantise(const Nf4Dequantise& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * NF4_BLOCK;
    a.bf16 ? nf4_rows(a, block, static_cast<bfloat16*>(a.out) + first)
           : nf4_rows(a, block, static_cast<float*>(a.out) + first);
  }
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
