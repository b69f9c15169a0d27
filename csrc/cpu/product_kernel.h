// bf16 products: the rows of the left factor pass by panels of the right one, packed a group at a time.
//
// The left factor is read where it lies, or widened a passage at a time. Sums wait in fp32 between parts of the depth.
// Low-rank terms are some more depth to the panels of their module; masked ones are products of their own, added where
// the mask lets them.
//
// How panels lie in memory and which blocks read them is fixed by product_pairs.h or product_wide.h.
#pragma once

#include "scratch.h"

#if defined(PEFTDYNO_PAIRS)
#include "product_pairs.h"
#elif defined(__AVX2__)
#include "product_wide.h"
#endif

namespace peftdyno {
namespace PEFTDYNO_ISA {

#if defined(PEFTDYNO_PRODUCTS)

// Lines of the right factor that are packed next, asked for from memory between products: `per_step` at a time, along
// `num_rows` rows of `width` bytes.
struct Ahead {
  const char* row = nullptr;
  int64_t num_rows = 0, width = 0, stride = 0, per_step = 0, at = 0;

  PEFTDYNO_MEMBER void operator()() {
    for (int64_t i = 0; i < per_step && num_rows > 0; ++i) {
      _mm_prefetch(row + at, _MM_HINT_T1);
      at += 64;
      if (at < width) continue;
      at = 0;
      row += stride;
      --num_rows;
    }
  }
};

constexpr int64_t BLOCK = PRODUCT_ROWS * PANEL;  // values of a block's sums

// What a thread works with.
struct ProductScratch {
  Operand *panels, *left, *low_rank;  // the last [modules, chunk_rows, largest rank]
  float *sums, *term_sums;             // the last of a masked low-rank term
};

// Some panels at one block of the depth, and the rows of one run that pass by them.
struct Passage {
  int64_t run, row_begin, row_end, first, depth;
  bool last;             // block of the depth
  const Panel* panels;
  int64_t num_panels;
  const Operand* packed;  // `packed_size` elements from a panel to the next
  int64_t packed_size, sums_size;
};

template <class T>
static void copy_term(const LowRankTerm& term, const Passage& s, Operand* to) {
  for (int64_t r = 0; r < padded_to(s.row_end - s.row_begin, PRODUCT_ROWS); ++r, to += term.padded_rank) {
    const int64_t row = smaller(s.row_begin + r, s.row_end - 1);
    copy_row(row_of<T>(term.left, row), row == s.row_begin + r ? term.rank : 0, term.padded_rank, nullptr, to);
  }
}

// The left factors of a passage's low-rank terms, copied to whole blocks.
static void copy_low_rank(const Product& p, const Passage& s, Operand* to) {
  int64_t copied = 0;  // one beyond the last module whose factor is
  for (int64_t i = 0; i < s.num_panels; ++i)
    for (int64_t m = s.panels[i].first_module; m < s.panels[i].last_module; ++m) {
      if (m < copied) continue;
      copied = m + 1;
      const LowRankTerm& term = p.terms[m * p.num_runs + s.run];
      Operand* rows = to + m * p.chunk_rows * p.largest_rank;
      term.left_bf16 ? copy_term<bfloat16>(term, s, rows) : copy_term<Operand>(term, s, rows);
    }
}

// A low-rank term's part of a block.
PEFTDYNO_INLINE BlockFactors low_rank_factors(const LowRankTerm& term, const Panel& panel, const Operand* left) {
  const int64_t offset = panel.column - term.column, strip = offset / LORA_STRIP * LORA_STRIP;
  return strip_factors(term.padded_rank, left, static_cast<const Operand*>(term.right) + strip * term.padded_rank,
                       offset - strip, padded_to(smaller(LORA_STRIP, term.width - strip), 32));
}

// c += the part of a masked term, where the mask lets it.
static void add_masked(const Product& p, const LowRankTerm& term, const Panel& panel, const BlockFactors& factors,
                       int64_t row, int64_t rows, float* part, float* c, Ahead& ahead) {
  PanelBlock block(sums_in(part), rows, false);
  block.add(factors, ahead);
  block.end();
  const int64_t offset = panel.column - term.column, strip = offset / LORA_STRIP;
  const uint32_t* mask = term.masks + (strip * p.rows + row) * STRIP_WORDS + offset % LORA_STRIP / 32;
  for (int64_t r = 0; r < rows; ++r, mask += STRIP_WORDS)
    for (int64_t i = 0; i < PANEL; i += LANES) {
      const int64_t at = r * PANEL + i;
      store(c + at, load(c + at) + masked(load(part + at), *mask >> i));
    }
}

// f(term, factors) for a panel's low-rank terms with masks or without, for the rows from `row` of the passage on.
template <bool MASKED, class F>
PEFTDYNO_INLINE void for_low_rank(const Product& p, const Passage& s, const Panel& panel, int64_t row,
                                  const ProductScratch& scratch, const F& f) {
  for (int64_t m = panel.first_module; m < panel.last_module; ++m) {
    const LowRankTerm& term = p.terms[m * p.num_runs + s.run];
    if ((term.masks != nullptr) != MASKED) continue;
    const Operand* left = scratch.low_rank + m * p.chunk_rows * p.largest_rank + (row - s.row_begin) * term.padded_rank;
    f(term, low_rank_factors(term, panel, left));
  }
}

// A panel at `depth` of the passage's depth from `first` on. Its sums wait in fp32 between parts of the depth.
static void panel_rows(const Product& p, const Passage& s, int64_t i, int64_t first, int64_t depth,
                       const ProductScratch& scratch, Ahead& ahead) {
  const Panel& panel = s.panels[i];
  const bool add = s.first + first > 0, last = s.last && first + depth == s.depth;
  const Operand* right = s.packed + i * s.packed_size + first * PANEL;
  float* c = scratch.sums + i * s.sums_size;
  for (int64_t row = s.row_begin; row < s.row_end; row += PRODUCT_ROWS, c += BLOCK) {
    const int64_t rows = smaller(PRODUCT_ROWS, s.row_end - row);
    const LeftRows left = left_rows(p, row, s.row_begin, s.first, s.depth, first, scratch.left);
    PanelBlock block(sums_in(c), rows, add);
    block.add(panel_factors(depth, left, right), ahead);
    if (last)
      for_low_rank<false>(p, s, panel, row, scratch,
                          [&](const LowRankTerm&, const BlockFactors& factors) { block.add(factors, ahead); });
    block.end();
    if (!last) continue;
    for_low_rank<true>(p, s, panel, row, scratch, [&](const LowRankTerm& term, const BlockFactors& factors) {
      add_masked(p, term, panel, factors, row, rows, scratch.term_sums, c, ahead);
    });
    put_panel(p, panel, row, rows, c);
  }
}

// A part of the result that one thread computes: a group of panels times a share of the rows.
struct Unit {
  int64_t row_begin, row_end;
  const Panel* panels;
  int64_t num_panels;  // 0 beyond the last unit
};

static Unit unit_of(const Product& p, int64_t unit) {
  if (unit >= p.num_units()) return {};
  const int64_t share = unit / p.groups(), first = unit % p.groups() * p.group;
  const int64_t blocks = ratio_up(p.rows, PRODUCT_ROWS);
  return {blocks * share / p.row_shares * PRODUCT_ROWS,
          smaller(p.rows, blocks * (share + 1) / p.row_shares * PRODUCT_ROWS), p.panels + first,
          smaller(p.group, p.num_panels - first)};
}

// What is packed after a passage: the next block of the depth of its panels, or the panels of the next unit.
static Ahead ahead_of(const Product& p, const Passage& s, const Unit& next) {
  const Panel* from = s.last ? next.panels : s.panels;
  const int64_t count = s.last ? next.num_panels : s.num_panels;
  if (count == 0) return {};
  const int64_t first = s.last ? 0 : s.first + s.depth, depth = smaller(p.depth_block, p.depth - first);
  Ahead ahead{};
  if (p.packed != nullptr) {
    constexpr int64_t line = sizeof(Operand) * PANEL;
    const Operand* start = static_cast<const Operand*>(p.packed) + from->column * p.depth + first * PANEL;
    ahead = {reinterpret_cast<const char*>(start), count, line * depth, line * p.depth, 0, 0};
  } else {
    const int64_t column = from->column, width = from[count - 1].column + from[count - 1].width - column;
    const bfloat16* start =
        p.transposed ? row_of<bfloat16>(p.right, column) + first : row_of<bfloat16>(p.right, first) + column;
    ahead = {reinterpret_cast<const char*>(start), p.transposed ? width : depth, 2 * (p.transposed ? depth : width),
             2 * p.right.stride, 0, 0};
  }
  const int64_t lines = ahead.num_rows * ratio_up(ahead.width, 64);
  const int64_t blocks = s.num_panels * ratio_up(s.row_end - s.row_begin, PRODUCT_ROWS);
  ahead.per_step = ratio_up(lines, blocks * (s.depth / 32));
  return ahead;
}

// One block of the depth: every panel, a part at a time that stays in the first-level cache while the rows pass by.
static void pass(const Product& p, const Passage& s, const Unit& next, const ProductScratch& scratch) {
  Ahead ahead = ahead_of(p, s, next);
  copy_left(p, s.row_begin, s.row_end, s.first, s.depth, scratch.left);
  if (s.last) copy_low_rank(p, s, scratch.low_rank);
  const int64_t part = padded_to(ratio_up(s.depth, ratio_up(s.depth, CACHED_DEPTH)), 32);
  for (int64_t i = 0; i < s.num_panels; ++i)
    for (int64_t first = 0; first < s.depth; first += part)
      panel_rows(p, s, i, first, smaller(part, s.depth - first), scratch, ahead);
}

// A unit's rows of one run.
static void unit_rows(const Product& p, const Unit& unit, int64_t run, int64_t row_begin, int64_t row_end,
                      const Unit& next, const ProductScratch& scratch) {
  const bool whole = p.depth_block >= p.depth, kept = p.packed != nullptr;
  const int64_t packed_size = PANEL * (kept ? p.depth : p.depth_block), sums_size = whole ? 0 : p.chunk_rows * PANEL;
  const Operand* packed = scratch.panels;
  for (int64_t row = row_begin; row < row_end; row += p.chunk_rows)
    for (int64_t first = 0; first < p.depth; first += p.depth_block) {
      const int64_t depth = smaller(p.depth_block, p.depth - first);
      if (kept)
        packed = static_cast<const Operand*>(p.packed) + unit.panels->column * p.depth + first * PANEL;
      else if (!whole || row == unit.row_begin)
        pack_panels(p, unit.panels, unit.num_panels, first, depth, scratch.panels, packed_size);
      const Passage s{run, row, smaller(row + p.chunk_rows, row_end), first, depth, first + depth == p.depth,
                      unit.panels, unit.num_panels, packed, packed_size, sums_size};
      pass(p, s, next, scratch);
    }
}

#if defined(PEFTDYNO_PAIRS)

// Every panel of the right factor, whole, in the order of columns.
static void pack_product(const Product& p, int64_t begin, int64_t end, void* to) {
  pack_panels(p, p.panels + begin, end - begin, 0, p.depth, static_cast<bfloat16*>(to) + begin * PANEL * p.depth,
              PANEL * p.depth);
}

#endif

// Units one after another, as threads come for them: a thread that its processor slows down takes fewer.
static void product(const Product& p, int64_t* next_unit, void* memory) {
  Scratch room{static_cast<uint8_t*>(memory)};
  ProductScratch scratch;
  scratch.panels = room.take<Operand>(p.packed == nullptr ? p.group * p.depth_block * PANEL : 0);
  scratch.left = room.take<Operand>(left_size(p));
  scratch.sums = room.take<float>((p.depth_block < p.depth ? p.group : 1) * p.chunk_rows * PANEL);
  scratch.term_sums = room.take<float>(BLOCK);
  scratch.low_rank = room.take<Operand>(0);
  begin_blocks();
  Unit next = unit_of(p, __atomic_fetch_add(next_unit, 1, __ATOMIC_RELAXED));
  while (next.num_panels > 0) {
    const Unit unit = next;
    next = unit_of(p, __atomic_fetch_add(next_unit, 1, __ATOMIC_RELAXED));
    for (int64_t run = 0; run < p.num_runs; ++run) {
      const int64_t from = p.run_offsets[run] > unit.row_begin ? p.run_offsets[run] : unit.row_begin;
      const int64_t to = smaller(p.run_offsets[run + 1], unit.row_end);
      if (from < to) unit_rows(p, unit, run, from, to, next, scratch);
    }
  }
  end_blocks();
}

#endif

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
