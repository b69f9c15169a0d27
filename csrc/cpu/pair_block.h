// A block of a bf16 product: 16 rows of a left factor times 16 or 32 columns of a right one, summed in fp32.
//
// `TileBlock` and `DotBlock` are used alike: `begin` with sums of zero or those in memory, `add` factors, `end`. Tiles hold
// the sums from `begin` to `end`; registers are too few for that, so dot products add to memory each time.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

#if defined(PEFTDYNO_PAIRS)

constexpr int64_t PAIR_ROWS = 16;

// Rows of the left factor: `stride` bytes from row to row, `step` elements to the next 32 of the depth.
struct LeftRows {
  const bfloat16* first;
  int64_t stride, step;
};

// The right factor's columns, 16 side by side: `stride` bytes to the next pair of rows, `other` elements to 16 columns
// more, `step` to the next 32 of the depth.
struct RightPairs {
  const bfloat16* first;
  int64_t stride, other, step;
};

struct BlockFactors {
  int64_t depth;  // a multiple of 32
  LeftRows a;
  RightPairs b;
};

// fp32 in memory: `stride` elements from row to row, `other` to 16 columns more.
struct BlockSums {
  float* first;
  int64_t stride, other;
};

#if defined(PEFTDYNO_TILES)

// Two sums and two operands: more tiles in use can cost more time than they save loads (docs/decisions/cpu-products.md).
template <int COLUMNS>
class TileBlock {
 public:
  PEFTDYNO_MEMBER TileBlock(const BlockSums& sums, int64_t, bool add) : sums_(sums) {
    if (add) {
      _tile_loadd(0, sums.first, sums.stride * 4);
      if (COLUMNS == 2) _tile_loadd(1, sums.first + sums.other, sums.stride * 4);
    } else {
      _tile_zero(0);
      if (COLUMNS == 2) _tile_zero(1);
    }
  }

  template <class Between>
  PEFTDYNO_MEMBER void add(const BlockFactors& f, Between&& between) {
    const bfloat16 *a = f.a.first, *b = f.b.first;
    for (int64_t k = 0; k < f.depth; k += 32, a += f.a.step, b += f.b.step) {
      _tile_loadd(2, a, f.a.stride);
      _tile_loadd(3, b, f.b.stride);
      between();
      _tile_dpbf16ps(0, 2, 3);
      if (COLUMNS == 1) continue;
      _tile_loadd(3, b + f.b.other, f.b.stride);
      _tile_dpbf16ps(1, 2, 3);
    }
  }

  PEFTDYNO_MEMBER void end() {
    _tile_stored(0, sums_.first, sums_.stride * 4);
    if (COLUMNS == 2) _tile_stored(1, sums_.first + sums_.other, sums_.stride * 4);
  }

 private:
  BlockSums sums_;
};

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64};  // of four tiles; the others stay free
  uint8_t rows[16] = {16, 16, 16, 16};
};

// Around blocks, once a thread.
PEFTDYNO_INLINE void begin_blocks() {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
}
PEFTDYNO_INLINE void end_blocks() { _tile_release(); }

template <int COLUMNS>
using PairBlock = TileBlock<COLUMNS>;

#else

template <int COLUMNS>
class DotBlock {
 public:
  // Of `rows` rows, at most 16; sums of others may be computed too.
  PEFTDYNO_MEMBER DotBlock(const BlockSums& sums, int64_t rows, bool add) : sums_(sums), rows_(rows), add_(add) {}

  template <class Between>
  PEFTDYNO_MEMBER void add(const BlockFactors& f, Between&& between) {
    int64_t row = 0;
    for (; row + 4 < rows_; row += 8) some<8>(f, row, between);
    if (row < rows_) some<4>(f, row, between);
    add_ = true;
  }

  PEFTDYNO_MEMBER void end() {}

 private:
  // Sums stay in registers; a pair of the left factor is loaded once for all columns.
  template <int ROWS, class Between>
  PEFTDYNO_MEMBER void some(const BlockFactors& f, int64_t row, Between&& between) {
    float* sums = sums_.first + row * sums_.stride;
    __m512 total[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; ++j)
        total[i][j] = add_ ? _mm512_loadu_ps(sums + i * sums_.stride + j * sums_.other) : _mm512_setzero_ps();
    const char *a = reinterpret_cast<const char*>(f.a.first) + row * f.a.stride;
    const char *b = reinterpret_cast<const char*>(f.b.first);
    for (int64_t k = 0; k < f.depth; k += 32, a += 2 * f.a.step, b += 2 * f.b.step) {
      if (row == 0) between();
      for (int64_t pair = 0; pair < 16; ++pair) {
        __m512bh right[COLUMNS];
#pragma GCC unroll 2
        for (int64_t j = 0; j < COLUMNS; ++j)
          right[j] = bit_cast<__m512bh>(_mm512_loadu_si512(b + pair * f.b.stride + 2 * j * f.b.other));
#pragma GCC unroll 16
        for (int64_t i = 0; i < ROWS; ++i) {
          int32_t two;
          __builtin_memcpy(&two, a + i * f.a.stride + 4 * pair, sizeof two);
          const __m512bh left = bit_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 2
          for (int64_t j = 0; j < COLUMNS; ++j) total[i][j] = _mm512_dpbf16_ps(total[i][j], left, right[j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(sums + i * sums_.stride + j * sums_.other, total[i][j]);
  }

  BlockSums sums_;
  int64_t rows_;
  bool add_;
};

PEFTDYNO_INLINE void begin_blocks() {}
PEFTDYNO_INLINE void end_blocks() {}

template <int COLUMNS>
using PairBlock = DotBlock<COLUMNS>;

#endif

#endif

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
