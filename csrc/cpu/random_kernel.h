// Dropout's keep mask from Philox4x32-7 (Salmon et al., SC 2011); layout in kernels/random.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

struct Words {
  VecU w[4];
};

// High and low halves of each lane's product with m.
PEFTDYNO_INLINE void multiply(VecU a, uint32_t m, VecU& high, VecU& low) {
  typedef uint64_t Wide __attribute__((vector_size(4 * PEFTDYNO_LANES)));
  Wide pairs = bit_cast<Wide>(a);
  Wide even = (pairs & 0xffffffffull) * static_cast<uint64_t>(m);
  Wide odd = (pairs >> 32) * static_cast<uint64_t>(m);
  low = bit_cast<VecU>((even & 0xffffffffull) | (odd << 32));
  high = bit_cast<VecU>((even >> 32) | (odd & 0xffffffff00000000ull));
}

// Counters (first + lane, stream low, stream high, 0).
PEFTDYNO_INLINE Words philox(uint32_t first, uint64_t stream, uint64_t key) {
  VecU c0, c1, c2, c3 = {};
  for (int64_t i = 0; i < LANES; ++i) c0[i] = static_cast<uint32_t>(i);
  c0 += first;
  c1 = static_cast<uint32_t>(stream) - VecU{};
  c2 = static_cast<uint32_t>(stream >> 32) - VecU{};
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
  return {{c0, c1, c2, c3}};
}

// The keep factors (0 or scale) of LANES * 8 columns from `column` (a multiple of it) on, in their order.
PEFTDYNO_INLINE void keep_factors(const Dropout& d, int64_t row, int64_t column, float* factors) {
  Words words = philox(static_cast<uint32_t>(column / 8), static_cast<uint64_t>(d.streams[row]), d.key);
  uint16_t halves[LANES * 8];
  for (int64_t lane = 0; lane < LANES; ++lane)
    for (int64_t w = 0; w < 4; ++w) {
      halves[lane * 8 + 2 * w] = static_cast<uint16_t>(words.w[w][lane]);
      halves[lane * 8 + 2 * w + 1] = static_cast<uint16_t>(words.w[w][lane] >> 16);
    }
  for (int64_t i = 0; i < LANES * 8; ++i) factors[i] = halves[i] >= d.threshold ? d.scale : 0.0f;
}

template <class T>
static void drop_rows_rows(const DropRows& a, int64_t begin, int64_t end) {
  float factors[LANES * 8];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(a.x, row);
    T* target = row_of<T>(a.target, row);
    for (int64_t column = 0; column < a.width; column += LANES * 8) {
      keep_factors(a.dropout, row, column, factors);
      int64_t stop = a.width - column < LANES * 8 ? a.width - column : LANES * 8;
      for (int64_t i = 0; i < stop; i += LANES) {
        int64_t left = stop - i;
        Vec v = load_upto(x + column + i, left) * load(factors + i);
        if (a.add) v += load_upto(target + column + i, left);
        store_upto(target + column + i, v, left);
      }
    }
  }
}

static void drop_rows(const DropRows& a, int64_t begin, int64_t end) {
  a.bf16 ? drop_rows_rows<bfloat16>(a, begin, end) : drop_rows_rows<float>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
