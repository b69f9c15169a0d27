// Panels of bf16 pairs and the blocks that read them, where the processor multiplies bf16.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "product_plan.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

using Operand = bfloat16;

constexpr int64_t CACHED_DEPTH = 288;  // of a panel that stays in the first-level cache while rows pass by

using PanelBlock = PairBlock<PANEL / 16>;

// Sums of a block, [PRODUCT_ROWS, PANEL].
PEFTDYNO_INLINE BlockSums sums_in(float* c) {
  return {c, PANEL, 16};
}

// Rows of the left factor by what lies at `depth` of a panel.
PEFTDYNO_INLINE BlockFactors panel_factors(int64_t depth, const LeftRows& left, const bfloat16* panel) {
  return {depth, left, {panel, 64, PANEL * 16, PANEL * 32}};
}

// The copied left factor of a low-rank term by 32 columns of its strip; those lie `columns` apart from row to row.
PEFTDYNO_INLINE BlockFactors strip_factors(int64_t rank, const bfloat16* left, const bfloat16* strip, int64_t column,
                                           int64_t columns) {
  return {rank, {left, 2 * rank, 32}, {strip + 2 * column, 4 * columns, 32, 32 * columns}};
}

PEFTDYNO_INLINE __mmask32 columns_of(const Panel& panel) {
  return panel.width == PANEL ? ~0u : (1u << panel.width) - 1;
}

// A panel of a right factor whose columns lie as rows, `depth` deep from `first` on.
static void pack_columns(const Product& p, const Panel& panel, int64_t first, int64_t depth, bfloat16* to) {
  const int64_t stride = p.right.stride;
  const bfloat16* from = row_of<bfloat16>(p.right, panel.column) + first;
  if (panel.width == PANEL && stride % 2 == 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t k = 0; k < depth / 2; k += LANES) {
      transpose_square(words + k, stride / 2, pairs + k * PANEL, LANES);
      transpose_square(words + LANES * stride / 2 + k, stride / 2, pairs + k * PANEL + LANES * LANES, LANES);
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += 32, to += PANEL * 32)
    for (int64_t half = 0; half < PANEL; half += LANES) {
      const bfloat16* columns[LANES];
      const int64_t count = smaller(LANES, panel.width - half);
      for (int64_t i = 0; i < count; ++i) columns[i] = from + (half + i) * stride + k;
      PairLayout::pack_transposed(columns, count, LANES, 32, 32, to + half * 32);
    }
}

// Panels of a right factor that lies row by row; all of them a pair of rows at a time, as memory likes it. `size`
// elements lie between the panels.
static void pack_pairs(const Product& p, const Panel* panels, int64_t count, int64_t first, int64_t depth, bfloat16* to,
                       int64_t size) {
  constexpr int64_t AHEAD = 8;  // rows
  for (int64_t k = 0; k < depth; k += 2) {
    const bfloat16* even = row_of<bfloat16>(p.right, first + k);
    for (int64_t i = 0; i < count; ++i) {
      const bfloat16 *from = even + panels[i].column, *below = from + p.right.stride;
      ask_for(from + AHEAD * p.right.stride);
      ask_for(below + AHEAD * p.right.stride);
      const __m512i a = _mm512_maskz_loadu_epi16(columns_of(panels[i]), from);
      const __m512i b = _mm512_maskz_loadu_epi16(columns_of(panels[i]), below);
      bfloat16* target = to + i * size + k / 32 * 32 * PANEL + k % 32 * LANES;
      _mm512_storeu_si512(target, PairLayout::interleaved_low(a, b));
      _mm512_storeu_si512(target + 32 * LANES, PairLayout::interleaved_high(a, b));
    }
  }
}

// Panels, `depth` deep from `first` on and `size` elements apart.
static void pack_panels(const Product& p, const Panel* panels, int64_t count, int64_t first, int64_t depth, bfloat16* to,
                        int64_t size) {
  if (!p.transposed) return pack_pairs(p, panels, count, first, depth, to, size);
  for (int64_t i = 0; i < count; ++i) pack_columns(p, panels[i], first, depth, to + i * size);
}

// 32 columns of the sums of a block, as the result holds them.
struct PanelRow {
  Vec low, high;

  PEFTDYNO_INLINE PanelRow of(__m512i pairs) {
    return {widen(bit_cast<VecH>(_mm512_castsi512_si256(pairs))), widen(bit_cast<VecH>(_mm512_extracti64x4_epi64(pairs, 1)))};
  }

  PEFTDYNO_INLINE __m512i rounded(const PanelRow& r) {
    return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(r.high), bit_cast<__m512>(r.low)));
  }
};

// Sums of a block to the result.
static void put_panel(const Product& p, const Panel& panel, int64_t row, int64_t rows, const float* c) {
  const __mmask32 inside = columns_of(panel);
  PanelRow bias{};
  if (p.bias != nullptr)
    bias = PanelRow::of(_mm512_maskz_loadu_epi16(inside, static_cast<const bfloat16*>(p.bias) + panel.column));
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* to = row_of<bfloat16>(p.out, row + r) + panel.column;
    const float* from = c + r * PANEL;
    PanelRow sums{load(from) + bias.low, load(from + LANES) + bias.high};
    if (p.accumulate) {
      const PanelRow before = PanelRow::of(_mm512_maskz_loadu_epi16(inside, to));
      sums = {sums.low + before.low, sums.high + before.high};
    }
    _mm512_mask_storeu_epi16(to, inside, PanelRow::rounded(sums));
  }
}

// Elements of the left factor that a thread copies.
PEFTDYNO_INLINE int64_t left_size(const Product& p) {
  return PRODUCT_ROWS * p.depth_block;
}

// Of rows from `begin` to `end`, at `depth` from `first` on, those that blocks cannot read where they lie: the last, where
// a whole block would reach beyond the matrix. Beyond it zero.
static void copy_left(const Product& p, int64_t begin, int64_t end, int64_t first, int64_t depth, bfloat16* to) {
  const int64_t row = begin + (end - begin - 1) / PRODUCT_ROWS * PRODUCT_ROWS;
  if (row + PRODUCT_ROWS <= p.rows) return;
  for (int64_t r = 0; r < PRODUCT_ROWS; ++r) {
    const bfloat16* from = row + r < p.rows ? row_of<bfloat16>(p.left, row + r) + first : nullptr;
    for (int64_t k = 0; k < depth; k += 32)
      _mm512_storeu_si512(to + k * PRODUCT_ROWS + r * 32,
                          from == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(from + k));
  }
}

// A block of rows at `part` elements beyond the depth `first`; `begin` and `depth` as they were copied.
PEFTDYNO_INLINE LeftRows left_rows(const Product& p, int64_t row, int64_t, int64_t first, int64_t, int64_t part,
                                   const bfloat16* copied) {
  if (row + PRODUCT_ROWS > p.rows) return {copied + part * PRODUCT_ROWS, 64, 32 * PRODUCT_ROWS};
  return {row_of<bfloat16>(p.left, row) + first + part, 2 * p.left.stride, 32};
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
