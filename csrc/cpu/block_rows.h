// Rows of tensors as operands of the block products: whole, padded with zeros, in the engine's type.
#pragma once

#include "matrix.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

constexpr int64_t ROWS_AHEAD = 8;  // of one that is copied, asked for from memory

// Some elements of a row that is read soon; rows lie too far apart for the processor to ask for them by itself.
template <class T>
PEFTDYNO_INLINE void ask_for_row(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) ask_for(row + i);
}

// The first `width` elements of a row, then zeros up to `padded`; where a mask is given, what it lets pass.
#if defined(PEFTDYNO_PAIRS)
PEFTDYNO_INLINE void copy_row(const bfloat16* from, int64_t width, int64_t padded, const uint32_t* mask, bfloat16* to) {
  for (int64_t i = 0; i < padded; i += 32) {
    __mmask32 inside = width - i >= 32 ? ~0u : i < width ? (1u << (width - i)) - 1 : 0u;
    if (mask != nullptr) inside &= mask[i / 32];
    _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(inside, from + i));
  }
}
#endif

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
