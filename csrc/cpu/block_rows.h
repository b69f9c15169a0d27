// Rows of tensors as operands of the block products: whole, padded with zeros, in the engine's type.
#pragma once

#include "matrix.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

// The first `width` elements of a row, then zeros up to `padded`; where a mask is given, what it lets pass.
PEFTDYNO_INLINE void copy_row(const bfloat16* from, int64_t width, int64_t padded, const uint32_t* mask, bfloat16* to) {
  for (int64_t i = 0; i < padded; i += LANES) {
    VecH v = {};
    if (i + LANES <= width)
      __builtin_memcpy(&v, from + i, sizeof v);
    else
      for (int64_t j = 0; j < width - i; ++j) v[j] = from[i + j].bits;
    if (mask != nullptr) v = masked(v, mask_bits(mask, i));
    __builtin_memcpy(to + i, &v, sizeof v);
  }
}

template <class T>
PEFTDYNO_INLINE void copy_row(const T* from, int64_t width, int64_t padded, const uint32_t* mask, float* to) {
  for (int64_t i = 0; i < padded; i += LANES) {
    Vec v = i < width ? load_upto(from + i, width - i) : Vec{};
    if (mask != nullptr) v = masked(v, mask_bits(mask, i));
    store(to + i, v);
  }
}

// A left operand and the distance between its rows.
template <class E>
struct Left {
  const E* rows;
  int64_t stride;
};

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
