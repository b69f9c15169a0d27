// Panels of fp32 and the blocks that read them, where the processor multiplies no bf16: both factors are widened as they
// are packed.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "product_plan.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

using Operand = float;

constexpr int64_t CACHED_DEPTH = 144;  // of a panel that stays in the first-level cache while rows pass by

// Rows of the left factor, `stride` elements apart.
struct LeftRows {
  const float* first;
  int64_t stride;
};

struct BlockFactors {
  int64_t depth;
  LeftRows a;
  const float* b;
  int64_t b_stride;
};

// Used as the blocks of pair_block.h are: sums [PRODUCT_ROWS, PANEL] stay in memory.
class WideBlock {
 public:
  PEFTDYNO_MEMBER WideBlock(float* sums, int64_t rows, bool add) : sums_(sums), rows_(rows), add_(add) {}

  template <class Between>
  PEFTDYNO_MEMBER void add(const BlockFactors& f, Between&& between) {
    for (int64_t k = 0; k < f.depth; k += 32) between();
    Fp32Engine::multiply(rows_, PANEL, f.depth, f.a.first, f.a.stride, f.b, f.b_stride, sums_, PANEL, add_);
    add_ = true;
  }

  PEFTDYNO_MEMBER void end() {}

 private:
  float* sums_;
  int64_t rows_;
  bool add_;
};

PEFTDYNO_INLINE void begin_blocks() {}
PEFTDYNO_INLINE void end_blocks() {}

using PanelBlock = WideBlock;

PEFTDYNO_INLINE float* sums_in(float* c) {
  return c;
}

// Rows of the left factor by what lies at `depth` of a panel.
PEFTDYNO_INLINE BlockFactors panel_factors(int64_t depth, const LeftRows& left, const float* panel) {
  return {depth, left, panel, PANEL};
}

// The copied left factor of a low-rank term by 32 columns of its strip; those lie `columns` apart from row to row.
PEFTDYNO_INLINE BlockFactors strip_factors(int64_t rank, const float* left, const float* strip, int64_t column,
                                          int64_t columns) {
  return {rank, {left, rank}, strip + column, columns};
}

PEFTDYNO_INLINE float widened(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// A panel of a right factor whose columns lie as rows, `depth` deep from `first` on.
static void pack_columns(const Product& p, const Panel& panel, int64_t first, int64_t depth, float* to) {
  const int64_t stride = p.right.stride;
  const bfloat16* from = row_of<bfloat16>(p.right, panel.column) + first;
  if (panel.width < PANEL || stride % 2 != 0) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < PANEL; ++i) to[k * PANEL + i] = i < panel.width ? widened(from[i * stride + k]) : 0.0f;
    return;
  }
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  uint32_t pairs[LANES * LANES];  // [pairs of the depth, columns]
  for (int64_t k = 0; k < depth / 2; k += LANES)
    for (int64_t i = 0; i < PANEL; i += LANES) {
      transpose_square(words + i * stride / 2 + k, stride / 2, pairs, LANES);
      for (int64_t r = 0; r < LANES; ++r) {
        VecU both;
        __builtin_memcpy(&both, pairs + r * LANES, sizeof both);
        float* even = to + 2 * (k + r) * PANEL + i;
        store(even, bit_cast<Vec>(both << 16));
        store(even + PANEL, bit_cast<Vec>(both & 0xffff0000u));
      }
    }
}

// Panels, `depth` deep from `first` on and `size` elements apart.
static void pack_panels(const Product& p, const Panel* panels, int64_t count, int64_t first, int64_t depth, float* to,
                        int64_t size) {
  if (p.transposed) {
    for (int64_t i = 0; i < count; ++i) pack_columns(p, panels[i], first, depth, to + i * size);
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < count; ++i)
      copy_row(row_of<bfloat16>(p.right, first + k) + panels[i].column, panels[i].width, PANEL, nullptr,
               to + i * size + k * PANEL);
}

// Sums of a block to the result.
static void put_panel(const Product& p, const Panel& panel, int64_t row, int64_t rows, const float* c) {
  const bfloat16* bias = p.bias == nullptr ? nullptr : static_cast<const bfloat16*>(p.bias) + panel.column;
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* to = row_of<bfloat16>(p.out, row + r) + panel.column;
    for (int64_t i = 0; i < panel.width; i += LANES) {
      Vec sums = load(c + r * PANEL + i);
      if (bias != nullptr) sums += load_upto(bias + i, panel.width - i);
      if (p.accumulate) sums += load_upto(to + i, panel.width - i);
      store_upto(to + i, sums, panel.width - i);
    }
  }
}

// Elements of the left factor that a thread copies.
PEFTDYNO_INLINE int64_t left_size(const Product& p) {
  return p.chunk_rows * p.depth_block;
}

// Rows from `begin` to `end`, at `depth` from `first` on.
static void copy_left(const Product& p, int64_t begin, int64_t end, int64_t first, int64_t depth, float* to) {
  for (int64_t row = begin; row < end; ++row, to += depth)
    copy_row(row_of<bfloat16>(p.left, row) + first, depth, depth, nullptr, to);
}

// A block of rows at `part` elements beyond the depth `first`; `begin` and `depth` as they were copied.
PEFTDYNO_INLINE LeftRows left_rows(const Product&, int64_t row, int64_t begin, int64_t, int64_t depth, int64_t part,
                                   const float* copied) {
  return {copied + (row - begin) * depth + part, depth};
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
