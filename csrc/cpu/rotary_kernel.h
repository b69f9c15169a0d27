// Rotary embedding in place on rows; equations in kernels/rotary.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

template <class T>
static void rotary_rows(const Rotary& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *cos = a.cos + row * a.half, *sin = a.sin + row * a.half;
    for (int64_t head = 0; head < a.num_heads; ++head) {
      T* first = row_of<T>(a.qkv, row) + head * 2 * a.half;
      T* second = first + a.half;
      for (int64_t i = 0; i < a.half; i += LANES) {
        int64_t left = a.half - i;
        Vec c = load_upto(cos + i, left), s = load_upto(sin + i, left);
        if (a.inverse) s = -s;
        Vec x1 = load_upto(first + i, left), x2 = load_upto(second + i, left);
        store_upto(first + i, x1 * c - x2 * s, left);
        store_upto(second + i, x2 * c + x1 * s, left);
      }
    }
  }
}

static void rotary(const Rotary& a, int64_t begin, int64_t end) {
  a.bf16 ? rotary_rows<bfloat16>(a, begin, end) : rotary_rows<float>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
