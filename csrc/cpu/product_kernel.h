// Large bf16 products in tiles: panels of the right factor are packed as the rows of the left one pass by them.
//
// The left factor is read where it lies. With one block of the depth a result leaves the tiles once; with several its
// sum waits in fp32. Low-rank terms are some more depth to the panels of their module.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "product_plan.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

#if defined(PEFTDYNO_TILES)

// Tiles 0 to 3 += rows of A times a packed panel of B.
template <int ROWS>
PEFTDYNO_INLINE void panel_steps(int64_t depth, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb) {
  for (int64_t k = 0; k < depth; k += 32) {
    const bfloat16* pair = b + k * ldb;
    _tile_loadd(4, a + k, lda * 2);
    if (ROWS == 2) _tile_loadd(5, a + 16 * lda + k, lda * 2);
    _tile_loadd(6, pair, ldb * 4);
    _tile_loadd(7, pair + 32, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    for (int64_t r = 0; r < 16 * ROWS; ++r) _mm_prefetch(reinterpret_cast<const char*>(a + r * lda + k + 64), _MM_HINT_T0);
    if (ROWS == 1) continue;
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(2, 5, 6);
  }
}

// One factor pair of a block: `depth` may be 0.
struct PanelStep {
  int64_t depth, lda, ldb;
  const bfloat16 *a, *b;
};

// c [16 ROWS, 32] (+)= both steps.
template <int ROWS>
PEFTDYNO_INLINE void panel_block(const PanelStep& base, const PanelStep& low, float* c, bool add) {
  constexpr int64_t BYTES = PANEL * 4;
  float* below = c + 16 * PANEL;
  if (add) {
    _tile_loadd(0, c, BYTES);
    _tile_loadd(1, c + 16, BYTES);
    if (ROWS == 2) _tile_loadd(2, below, BYTES);
    if (ROWS == 2) _tile_loadd(3, below + 16, BYTES);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (ROWS == 2) _tile_zero(2);
    if (ROWS == 2) _tile_zero(3);
  }
  panel_steps<ROWS>(base.depth, base.a, base.lda, base.b, base.ldb);
  panel_steps<ROWS>(low.depth, low.a, low.lda, low.b, low.ldb);
  _tile_stored(0, c, BYTES);
  _tile_stored(1, c + 16, BYTES);
  if (ROWS == 2) _tile_stored(2, below, BYTES);
  if (ROWS == 2) _tile_stored(3, below + 16, BYTES);
}

// Columns of the right factor, `depth` deep from `first` on, as a panel: pairs of its rows interleaved.
static void pack_panel(const Product& p, const Panel& panel, int64_t first, int64_t depth, bfloat16* to) {
  if (p.transposed) {
    const int64_t stride = p.right.stride;
    const bfloat16* from = row_of<bfloat16>(p.right, panel.column) + first;
    if (panel.width == PANEL && stride % 2 == 0) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
      uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
      for (int64_t k = 0; k < depth / 2; k += LANES) {
        transpose_square(words + k, stride / 2, pairs + k * PANEL, PANEL);
        transpose_square(words + LANES * stride / 2 + k, stride / 2, pairs + k * PANEL + LANES, PANEL);
      }
      return;
    }
    const bfloat16* columns[PANEL];
    for (int64_t i = 0; i < panel.width; ++i) columns[i] = from + i * stride;
    AmxEngine::pack_transposed(columns, panel.width, PANEL, depth, depth, to);
    return;
  }
  const bfloat16* rows[32];
  for (int64_t k = 0; k < depth; k += 32) {
    for (int64_t r = 0; r < 32; ++r) rows[r] = row_of<bfloat16>(p.right, first + k + r) + panel.column;
    AmxEngine::pack_rows(rows, 32, 32, panel.width, PANEL, to + k * PANEL);
  }
}

// Sums of a block to the result, in the result's type.
static void put_panel(const Product& p, const Panel& panel, int64_t row, int64_t rows, const float* c) {
  const bfloat16* bias = p.bias == nullptr ? nullptr : static_cast<const bfloat16*>(p.bias) + panel.column;
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* to = row_of<bfloat16>(p.out, row + r) + panel.column;
    for (int64_t i = 0; i < panel.width; i += LANES) {
      Vec v = load(c + r * PANEL + i);
      if (bias != nullptr) v += load_upto(bias + i, panel.width - i);
      if (p.accumulate) v += load_upto(to + i, panel.width - i);
      store_upto(to + i, v, panel.width - i);
    }
  }
}

// What a thread works with.
struct ProductScratch {
  bfloat16 *panels, *left, *u;
  float* sums;
};

// The low-rank term of a block: u of its rows, copied to whole tiles, and s B^T of its columns.
static PanelStep low_rank_step(const Product& p, const Panel& panel, int64_t run, int64_t row, int64_t rows,
                               bfloat16* u) {
  if (panel.module < 0) return {0, 0, 0, nullptr, nullptr};
  const LoraTerm& term = p.lora->terms[panel.module * p.lora->num_runs + run];
  const int64_t rank = term.padded_rank, offset = panel.column - term.out_column, strip = offset / LORA_STRIP * LORA_STRIP;
  for (int64_t r = 0; r < PRODUCT_ROWS; ++r)
    copy_row(row_of<bfloat16>(p.lora->u, row + smaller(r, rows - 1)) + term.u_column, r < rows ? term.rank : 0, rank,
             nullptr, u + r * rank);
  const bfloat16* up = static_cast<const bfloat16*>(term.up_transposed) + strip * rank + 2 * (offset - strip);
  return {rank, rank, padded_to(smaller(LORA_STRIP, term.out_width - strip), 32), u, up};
}

// Rows of the left factor as they lie, or, where a block would reach beyond the last, copied.
static PanelStep base_step(const Product& p, int64_t row, int64_t rows, int64_t first, int64_t depth,
                           const bfloat16* panel, bfloat16* copy) {
  const int64_t read = rows > 16 ? 32 : 16;
  if (row + read <= p.rows) return {depth, p.left.stride, PANEL, row_of<bfloat16>(p.left, row) + first, panel};
  for (int64_t r = 0; r < read; ++r)
    copy_row(row_of<bfloat16>(p.left, row + smaller(r, rows - 1)) + first, r < rows ? depth : 0, depth, nullptr,
             copy + r * depth);
  return {depth, depth, PANEL, copy, panel};
}

// One block of the depth of one panel, for some rows of one run.
static void panel_rows(const Product& p, const Panel& panel, int64_t run, int64_t begin, int64_t end, int64_t first,
                       const bfloat16* packed, float* sums, const ProductScratch& scratch) {
  const int64_t depth = smaller(p.depth_block, p.depth - first);
  const bool last = first + depth == p.depth;
  for (int64_t row = begin; row < end; row += PRODUCT_ROWS) {
    const int64_t rows = smaller(PRODUCT_ROWS, end - row);
    float* c = sums + (p.depth_block < p.depth ? (row - begin) * PANEL : 0);
    const PanelStep base = base_step(p, row, rows, first, depth, packed, scratch.left);
    const PanelStep low = last ? low_rank_step(p, panel, run, row, rows, scratch.u) : PanelStep{};
    if (rows > 16)
      panel_block<2>(base, low, c, first > 0);
    else
      panel_block<1>(base, low, c, first > 0);
    if (last) put_panel(p, panel, row, rows, c);
  }
}

PEFTDYNO_INLINE const bfloat16* kept_panel(const Product& p, const Panel& panel) {
  return static_cast<const bfloat16*>(p.packed) + panel.column * p.depth;
}

// Panels begin to end - 1 of a share, packed together, for all of its rows of one run.
static void panel_group(const Product& p, const ProductShare& share, int64_t run, int64_t begin, int64_t end,
                        int64_t row_begin, int64_t row_end, const ProductScratch& scratch) {
  const int64_t panel_size = p.depth_block * PANEL, sums_size = p.depth_block < p.depth ? p.chunk_rows * PANEL : 0;
  for (int64_t row = row_begin; row < row_end; row += p.chunk_rows) {
    const int64_t stop = smaller(row + p.chunk_rows, row_end);
    for (int64_t first = 0; first < p.depth; first += p.depth_block) {
      const bool packed = p.depth_block >= p.depth && row > share.row_begin;
      for (int64_t i = begin; i < end; ++i) {
        bfloat16* mine = scratch.panels + (i - begin) * panel_size;
        const bfloat16* panel = p.packed == nullptr ? mine : kept_panel(p, p.panels[i]) + first * PANEL;
        if (panel == mine && !packed) pack_panel(p, p.panels[i], first, smaller(p.depth_block, p.depth - first), mine);
        panel_rows(p, p.panels[i], run, row, stop, first, panel, scratch.sums + (i - begin) * sums_size, scratch);
      }
    }
  }
}

// Every panel of the right factor, whole, in the order of columns.
static void pack_product(const Product& p, int64_t begin, int64_t end, void* to) {
  for (int64_t i = begin; i < end; ++i)
    pack_panel(p, p.panels[i], 0, p.depth, static_cast<bfloat16*>(to) + i * PANEL * p.depth);
}

static void product(const Product& p, const ProductShare& share, const int64_t* run_offsets, int64_t num_runs,
                    void* memory) {
  Scratch room{static_cast<uint8_t*>(memory)};
  ProductScratch scratch;
  scratch.panels = room.take<bfloat16>(p.packed == nullptr ? PANELS_AT_ONCE * p.depth_block * PANEL : 0);
  scratch.left = room.take<bfloat16>(PRODUCT_ROWS * p.depth_block);
  scratch.sums = room.take<float>(p.depth_block < p.depth ? PANELS_AT_ONCE * p.chunk_rows * PANEL : PRODUCT_ROWS * PANEL);
  scratch.u = room.take<bfloat16>(0);
  AmxEngine::begin();
  for (int64_t begin = share.panel_begin; begin < share.panel_end; begin += PANELS_AT_ONCE) {
    const int64_t end = smaller(begin + PANELS_AT_ONCE, share.panel_end);
    for (int64_t run = 0; run < num_runs; ++run) {
      const int64_t from = run_offsets[run] > share.row_begin ? run_offsets[run] : share.row_begin;
      const int64_t to = smaller(run_offsets[run + 1], share.row_end);
      if (from < to) panel_group(p, share, run, begin, end, from, to, scratch);
    }
  }
  AmxEngine::end();
}

#endif

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
