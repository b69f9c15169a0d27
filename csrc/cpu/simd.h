// Vectors of the width of one instruction set, written with the vector extensions of GCC and Clang.
//
// Included only by the per-instruction-set units: it must pull in no inline function of the standard library, which
// the linker could otherwise share with code for older processors.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX512F__)
#define PEFTDYNO_LANES 16
#elif defined(__AVX2__)
#define PEFTDYNO_LANES 8
#else
#define PEFTDYNO_LANES 4
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(PEFTDYNO_TILES) && defined(PEFTDYNO_EMULATE_TILES)
#include "emulated_tiles.h"
#endif

// Where the processor multiplies bf16. Compilers name their own macro for AMX differently.
#if defined(PEFTDYNO_TILES) || defined(__AVX512BF16__)
#define PEFTDYNO_PAIRS
#endif

// Where large products of bf16 are ours.
#if defined(PEFTDYNO_PAIRS) || defined(__AVX2__)
#define PEFTDYNO_PRODUCTS
#endif

namespace peftdyno {
namespace PEFTDYNO_ISA {

constexpr int64_t LANES = PEFTDYNO_LANES;
typedef float Vec __attribute__((vector_size(4 * PEFTDYNO_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * PEFTDYNO_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * PEFTDYNO_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * PEFTDYNO_LANES)));

#define PEFTDYNO_INLINE static inline __attribute__((always_inline))
#define PEFTDYNO_MEMBER inline __attribute__((always_inline))

template <class To, class From>
PEFTDYNO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

PEFTDYNO_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

PEFTDYNO_INLINE Vec broadcast(float x) {
  return x - Vec{};
}

PEFTDYNO_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

PEFTDYNO_INLINE void store(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Compilers split the plain conversions between 16 and 32 bits into halves; each set has one instruction or two.
PEFTDYNO_INLINE VecU extend(VecH h) {
#if defined(__AVX512F__)
  return bit_cast<VecU>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return bit_cast<VecU>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, VecU);
#endif
}

// The low halves.
PEFTDYNO_INLINE VecH truncate(VecU v) {
#if defined(__AVX512F__)
  return bit_cast<VecH>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256(bit_cast<__m256i>(v), _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return bit_cast<VecH>(_mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(v, VecH);
#endif
}

PEFTDYNO_INLINE Vec widen(VecH h) {
  return bit_cast<Vec>(extend(h) << 16);
}

PEFTDYNO_INLINE Vec load(const bfloat16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

// Upper half of each element's bits after rounding to the nearest, ties to even; NaN stays NaN.
PEFTDYNO_INLINE VecU rounded_bits(Vec v) {
  VecU bits = bit_cast<VecU>(v);
  VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  VecI nan = v != v;
  return nan ? (bits | 0x400000u) : rounded;
}

PEFTDYNO_INLINE VecH narrow(Vec v) {
#if defined(__AVX512BF16__)
  return bit_cast<VecH>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  return truncate(rounded_bits(v) >> 16);
#endif
}

PEFTDYNO_INLINE void store(bfloat16* p, Vec v) {
  VecH h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n elements; the others read as zero.
template <class T>
PEFTDYNO_INLINE Vec load_some(const T* p, int64_t n) {
  T buffer[LANES] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
PEFTDYNO_INLINE void store_some(T* p, Vec v, int64_t n) {
  T buffer[LANES];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class T>
PEFTDYNO_INLINE Vec load_upto(const T* p, int64_t n) {
  return n >= LANES ? load(p) : load_some(p, n);
}

template <class T>
PEFTDYNO_INLINE void store_upto(T* p, Vec v, int64_t n) {
  if (n >= LANES)
    store(p, v);
  else
    store_some(p, v, n);
}

// A mask is a bit an element, 32 to a word. Those of LANES elements from i, a multiple of LANES, on.
PEFTDYNO_INLINE uint32_t mask_bits(const uint32_t* words, int64_t i) {
  return words[i / 32] >> i % 32;
}

// v where a lane's bit is 1, zero where it is 0; higher bits do not matter.
PEFTDYNO_INLINE Vec masked(Vec v, uint32_t bits) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), bit_cast<__m512>(v)));
#else
  VecU lane;
  for (int64_t i = 0; i < LANES; ++i) lane[i] = 1u << i;
  return bit_cast<Vec>(bit_cast<VecU>(v) & bit_cast<VecU>((lane & bits) != 0));
#endif
}

PEFTDYNO_INLINE Vec select(VecI condition, Vec a, Vec b) {
  return condition ? a : b;
}

// a > b ? a : b, so b where one is NaN.
PEFTDYNO_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return select(a > b, a, b);
#endif
}

// a < b ? a : b, so b where one is NaN.
PEFTDYNO_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec>(_mm_min_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return select(a < b, a, b);
#endif
}

PEFTDYNO_INLINE float sum(Vec v) {
  float total[LANES];
  store(total, v);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) total[i] += total[i + half];
  return total[0];
}

PEFTDYNO_INLINE float largest(Vec v) {
  float best[LANES];
  store(best, v);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) best[i] = best[i] > best[i + half] ? best[i] : best[i + half];
  return best[0];
}

// The nearest integer of values below 2^22 in size, as float and as integer.
struct Rounded {
  Vec value;
  VecI integer;
};

PEFTDYNO_INLINE Rounded round_small(Vec x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  Vec shifted = x + shift;
  return {shifted - shift, bit_cast<VecI>(shifted) - 0x4b400000};
}

// exp(r) - 1 for |r| <= ln(2) / 2: the Taylor series to the 7th power, whose remainder is below 2^-27 of r.
PEFTDYNO_INLINE Vec expm1_reduced(Vec r) {
  Vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * r * r + r;
}

struct Reduced {
  Vec r;
  VecI n;
};

// x = n ln 2 + r, ln 2 in two parts (Cody & Waite 1980) so that r keeps its bits.
PEFTDYNO_INLINE Reduced reduce(Vec x) {
  Rounded n = round_small(x * 1.44269504088896341f);
  Vec r = x - n.value * 0.693359375f + n.value * 2.12194440e-4f;
  return {r, n.integer};
}

// p 2^n for 0.7 < p < 1.5 where the result is a normal number.
PEFTDYNO_INLINE Vec times_power(Vec p, VecI n) {
  return bit_cast<Vec>(bit_cast<VecU>(p) + (bit_cast<VecU>(n) << 23));
}

// 2^x for x <= 127, any number above and about 2^-126 below -126, NaN of NaN; a minimax polynomial of the 5th degree,
// relative error 7.5e-8.
PEFTDYNO_INLINE Vec exp2(Vec x) {
  const Vec bounded = maximum(broadcast(-126.0f), x);
  const Rounded n = round_small(bounded);
  const Vec f = bounded - n.value;
  Vec p = 1.32764718e-3f * f + 9.67554133e-3f;
  p = p * f + 5.55071327e-2f;
  p = p * f + 2.40221197e-1f;
  p = p * f + 6.93146967e-1f;
  return times_power(p * f + 1.00000007f, n.integer);
}

// exp(x) for -87 <= x <= 87, relative error 2.3e-7: the same polynomial in the base e.
PEFTDYNO_INLINE Vec exp_bounded(Vec x) {
  const Reduced e = reduce(x);
  Vec p = 8.29765512e-3f * e.r + 4.19153822e-2f;
  p = p * e.r + 1.66675747e-1f;
  p = p * e.r + 4.99988948e-1f;
  p = p * e.r + 9.99999692e-1f;
  return times_power(p * e.r + 1.00000007f, e.n);
}

// exp(x) for x <= 87, exactly 0 below -87, NaN of NaN.
PEFTDYNO_INLINE Vec exp(Vec x) {
  return select(x < -87.0f, Vec{}, exp_bounded(maximum(broadcast(-87.0f), x)));
}

// 1 / x of a normal x whose inverse is normal, relative error 1.2e-7: where division is slow, an estimate of 14 bits and
// a step of Newton's method.
PEFTDYNO_INLINE Vec inverse(Vec x) {
#if defined(__AVX512F__)
  const Vec estimate = bit_cast<Vec>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

PEFTDYNO_INLINE Vec sigmoid(Vec x) {
  return inverse(1.0f + exp_bounded(-minimum(maximum(x, broadcast(-87.0f)), broadcast(87.0f))));
}

// tanh |x| = -e / (e + 2) with e = exp(-2 |x|) - 1, which keeps the digits of small x.
PEFTDYNO_INLINE Vec tanh(Vec x) {
  Vec size = maximum(x, -x);
  Vec bounded = minimum(size, broadcast(20.0f));
  Reduced reduced = reduce(-2.0f * bounded);
  const Vec power = bit_cast<Vec>((reduced.n + 127) << 23);
  Vec e = expm1_reduced(reduced.r) * power + (power - 1.0f);
  Vec t = -e / (e + 2.0f);
  Vec signed_t = select(x < 0.0f, -t, t);
  return select(x != x, x, signed_t);
}

PEFTDYNO_INLINE Vec sqrt(Vec x) {
  Vec root;
  for (int64_t i = 0; i < LANES; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
}

// The run of a row among `offsets` [R + 1], searched onwards from `run`.
PEFTDYNO_INLINE int64_t run_of(int64_t row, const int64_t* offsets, int64_t num_runs, int64_t run) {
  while (run + 1 < num_runs && row >= offsets[run + 1]) ++run;
  return run;
}

// Ask for the cache line of what is read soon, where the processor would not by itself. Any address will do.
template <class T>
PEFTDYNO_INLINE void ask_for(const T* p) {
  __builtin_prefetch(p);
}

template <class T>
PEFTDYNO_INLINE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
