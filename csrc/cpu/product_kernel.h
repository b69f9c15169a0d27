// bf16 products in tiles: the rows of the left factor pass by panels of the right one, packed a group at a time.
//
// The left factor is read where it lies. With one block of the depth a result leaves the tiles once; with several its
// sum waits in fp32. Low-rank terms are some more depth to the panels of their
// module; masked ones are products of their own, added where the mask lets them.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "product_plan.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

#if defined(PEFTDYNO_TILES)

// Lines of the right factor that are packed next, asked for from memory while tiles multiply: `per_step` at a time,
// along `num_rows` rows of `width` bytes.
struct Ahead {
  const char* row = nullptr;
  int64_t num_rows = 0, width = 0, stride = 0, per_step = 0, at = 0;

  PEFTDYNO_INLINE void some(Ahead& a) {
    for (int64_t i = 0; i < a.per_step && a.num_rows > 0; ++i) {
      _mm_prefetch(a.row + a.at, _MM_HINT_T1);
      a.at += 64;
      if (a.at < a.width) continue;
      a.at = 0;
      a.row += a.stride;
      --a.num_rows;
    }
  }
};

// Two tiles side by side and those that follow them along the depth: `stride` bytes from row to row of a tile, `other`
// elements from the first tile to the second, `step` from a pair of tiles to the next.
struct Tiles {
  const bfloat16* first;
  int64_t stride, other, step;
};

PEFTDYNO_INLINE Tiles packed_tiles(const bfloat16* first) {
  return {first, 64, PANEL * 16, PANEL * 32};
}

// One factor pair of a block: `depth` may be 0.
struct PanelStep {
  int64_t depth;
  Tiles a, b;
};

// Tiles 0 to 3 += rows of A times a panel of B.
template <int ROWS>
PEFTDYNO_INLINE void panel_steps(const PanelStep& s, Ahead& ahead) {
  const bfloat16 *a = s.a.first, *b = s.b.first;
  for (int64_t k = 0; k < s.depth; k += 32, a += s.a.step, b += s.b.step) {
    _tile_loadd(4, a, s.a.stride);
    if (ROWS == 2) _tile_loadd(5, a + s.a.other, s.a.stride);
    _tile_loadd(6, b, s.b.stride);
    _tile_loadd(7, b + s.b.other, s.b.stride);
    Ahead::some(ahead);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (ROWS == 1) continue;
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(2, 5, 6);
  }
}

constexpr int64_t TILE = 256;  // values of a tile of sums; those of a block lie one tile after another

// Tiles 0 to 3 of 16 ROWS rows: zero, or what is in c.
template <int ROWS>
PEFTDYNO_INLINE void begin_sums(const float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + TILE, 64);
    if (ROWS == 2) _tile_loadd(2, c + 2 * TILE, 64);
    if (ROWS == 2) _tile_loadd(3, c + 3 * TILE, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (ROWS == 2) _tile_zero(2);
    if (ROWS == 2) _tile_zero(3);
  }
}

template <int ROWS>
PEFTDYNO_INLINE void end_sums(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + TILE, 64);
  if (ROWS == 2) _tile_stored(2, c + 2 * TILE, 64);
  if (ROWS == 2) _tile_stored(3, c + 3 * TILE, 64);
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
      AmxEngine::pack_transposed(columns, count, LANES, 32, 32, to + half * 32);
    }
}

// Panels of a right factor that lies row by row; all of them a pair of rows at a time, as memory likes it. `size`
// elements lie between the panels.
static void pack_pairs(const Product& p, const Panel* panels, int64_t count, int64_t first, int64_t depth, bfloat16* to,
                       int64_t size) {
  constexpr int64_t AHEAD = 8;  // rows
  VecU low_half, high_half;     // 0 32 1 33 ... and 16 48 17 49 ..., as 16-bit indices
  for (int64_t i = 0; i < LANES; ++i) {
    low_half[i] = static_cast<uint32_t>(i | (i + 32) << 16);
    high_half[i] = static_cast<uint32_t>((i + 16) | (i + 48) << 16);
  }
  for (int64_t k = 0; k < depth; k += 2) {
    const bfloat16* even = row_of<bfloat16>(p.right, first + k);
    for (int64_t i = 0; i < count; ++i) {
      const bfloat16 *from = even + panels[i].column, *below = from + p.right.stride;
      _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD * p.right.stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(below + AHEAD * p.right.stride), _MM_HINT_T0);
      const __m512i a = _mm512_maskz_loadu_epi16(columns_of(panels[i]), from);
      const __m512i b = _mm512_maskz_loadu_epi16(columns_of(panels[i]), below);
      bfloat16* target = to + i * size + k / 32 * 32 * PANEL + k % 32 * LANES;
      _mm512_storeu_si512(target, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(low_half), b));
      _mm512_storeu_si512(target + 32 * LANES, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(high_half), b));
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
    const float* from = c + r / 16 * 2 * TILE + r % 16 * LANES;
    PanelRow sums{load(from) + bias.low, load(from + TILE) + bias.high};
    if (p.accumulate) {
      const PanelRow before = PanelRow::of(_mm512_maskz_loadu_epi16(inside, to));
      sums = {sums.low + before.low, sums.high + before.high};
    }
    _mm512_mask_storeu_epi16(to, inside, PanelRow::rounded(sums));
  }
}

// What a thread works with.
struct ProductScratch {
  bfloat16 *panels, *left, *low_rank;  // the last [modules, PRODUCT_ROWS, largest rank]
  float *sums, *term_sums;             // the last of a masked low-rank term
};

// The low-rank terms of one run that reach a panel.
struct PanelTerms {
  const LowRankTerm* first;
  int64_t count, next;  // terms from one module to the next
  const bfloat16* left;
  int64_t left_size;
};

// A block's rows of a term's left factor, copied to whole tiles.
static void copy_low_rank(const LowRankTerm& term, int64_t row, int64_t rows, bfloat16* to) {
  for (int64_t r = 0; r < PRODUCT_ROWS; ++r)
    copy_row(row_of<bfloat16>(term.left, row + smaller(r, rows - 1)), r < rows ? term.rank : 0, term.padded_rank, nullptr,
             to + r * term.padded_rank);
}

// A low-rank term's part of a block.
PEFTDYNO_INLINE PanelStep low_rank_step(const LowRankTerm& term, const Panel& panel, const bfloat16* left) {
  const int64_t rank = term.padded_rank, offset = panel.column - term.column, strip = offset / LORA_STRIP * LORA_STRIP;
  const bfloat16* right = static_cast<const bfloat16*>(term.right) + strip * rank + 2 * (offset - strip);
  const int64_t columns = padded_to(smaller(LORA_STRIP, term.width - strip), 32);
  return {rank, {left, 2 * rank, 16 * rank, 32}, {right, 4 * columns, 32, 32 * columns}};
}

// c += the part of a masked term, where the mask lets it.
template <int ROWS>
PEFTDYNO_INLINE void add_masked(const Product& p, const LowRankTerm& term, const Panel& panel, const PanelStep& step,
                                int64_t row, int64_t rows, float* part, float* c, Ahead& ahead) {
  begin_sums<ROWS>(part, false);
  panel_steps<ROWS>(step, ahead);
  end_sums<ROWS>(part);
  const int64_t offset = panel.column - term.column, strip = offset / LORA_STRIP;
  const uint32_t* mask = term.masks + (strip * p.rows + row) * STRIP_WORDS + offset % LORA_STRIP / 32;
  for (int64_t r = 0; r < rows; ++r, mask += STRIP_WORDS) {
    const int64_t at = r / 16 * 2 * TILE + r % 16 * LANES;
    store(c + at, load(c + at) + masked(load(part + at), *mask));
    store(c + at + TILE, load(c + at + TILE) + masked(load(part + at + TILE), *mask >> LANES));
  }
}

// c (+)= base and low-rank terms, for `rows` rows, 16 ROWS in tiles.
template <int ROWS>
PEFTDYNO_INLINE void panel_block(const Product& p, const Panel& panel, const PanelStep& base, const PanelTerms& terms,
                                 int64_t row, int64_t rows, float* part, float* c, bool add, Ahead& ahead) {
  begin_sums<ROWS>(c, add);
  panel_steps<ROWS>(base, ahead);
  for (int64_t m = 0; m < terms.count; ++m)
    if (terms.first[m * terms.next].masks == nullptr)
      panel_steps<ROWS>(low_rank_step(terms.first[m * terms.next], panel, terms.left + m * terms.left_size), ahead);
  end_sums<ROWS>(c);
  for (int64_t m = 0; m < terms.count; ++m) {
    const LowRankTerm& term = terms.first[m * terms.next];
    if (term.masks == nullptr) continue;
    const PanelStep step = low_rank_step(term, panel, terms.left + m * terms.left_size);
    add_masked<ROWS>(p, term, panel, step, row, rows, part, c, ahead);
  }
}

// A block of rows of the left factor in packed tiles; rows beyond the last are zero.
static void pack_left(const Product& p, int64_t row, int64_t first, int64_t depth, bfloat16* to) {
  for (int64_t r = 0; r < PRODUCT_ROWS; ++r) {
    const bfloat16* from = row + r < p.rows ? row_of<bfloat16>(p.left, row + r) + first : nullptr;
    for (int64_t k = 0; k < depth; k += 32)
      _mm512_storeu_si512(to + k * PRODUCT_ROWS + r * 32,
                          from == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(from + k));
  }
}

// Some panels at one block of the depth, and the rows of one run that pass by them.
struct Passage {
  int64_t run, row_begin, row_end, first, depth;
  bool last;             // block of the depth
  const Panel* panels;
  int64_t num_panels;
  const bfloat16* packed;  // `packed_size` elements from a panel to the next
  int64_t packed_size, sums_size;
};

// A block's rows as they lie, or packed where a block as it lies would reach beyond the matrix.
static Tiles left_tiles(const Product& p, const Passage& s, int64_t row, int64_t rows, bfloat16* copy) {
  const int64_t stride = p.left.stride;
  if (row + (rows > 16 ? 32 : 16) <= p.rows) return {row_of<bfloat16>(p.left, row) + s.first, 2 * stride, 16 * stride, 32};
  pack_left(p, row, s.first, s.depth, copy);
  return packed_tiles(copy);
}

// A block of rows, which stay in the first-level cache, times every panel.
static void block_row(const Product& p, const Passage& s, int64_t row, float* sums, const ProductScratch& scratch,
                      Ahead& ahead) {
  const int64_t rows = smaller(PRODUCT_ROWS, s.row_end - row), left_size = PRODUCT_ROWS * p.largest_rank;
  const Tiles left = left_tiles(p, s, row, rows, scratch.left);
  int64_t copied = 0;  // one beyond the last module whose left factor is
  for (int64_t i = 0; i < s.num_panels; ++i) {
    const Panel& panel = s.panels[i];
    float* c = sums + i * s.sums_size;
    const PanelStep base{s.depth, left, packed_tiles(s.packed + i * s.packed_size)};
    PanelTerms terms{};
    if (s.last && panel.first_module < panel.last_module) {
      terms = {p.terms + panel.first_module * p.num_runs + s.run, panel.last_module - panel.first_module, p.num_runs,
               scratch.low_rank + panel.first_module * left_size, left_size};
      for (int64_t m = panel.first_module; m < panel.last_module && copied != panel.last_module; ++m)
        copy_low_rank(p.terms[m * p.num_runs + s.run], row, rows, scratch.low_rank + m * left_size);
      copied = panel.last_module;
    }
    if (rows > 16)
      panel_block<2>(p, panel, base, terms, row, rows, scratch.term_sums, c, s.first > 0, ahead);
    else
      panel_block<1>(p, panel, base, terms, row, rows, scratch.term_sums, c, s.first > 0, ahead);
    if (s.last) put_panel(p, panel, row, rows, c);
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
    const bfloat16* start = static_cast<const bfloat16*>(p.packed) + from->column * p.depth + first * PANEL;
    ahead = {reinterpret_cast<const char*>(start), count, 2 * PANEL * depth, 2 * PANEL * p.depth, 0, 0};
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

// One block of the depth.
static void pass(const Product& p, const Passage& s, const Unit& next, const ProductScratch& scratch) {
  Ahead ahead = ahead_of(p, s, next);
  for (int64_t row = s.row_begin; row < s.row_end; row += PRODUCT_ROWS)
    block_row(p, s, row, scratch.sums + (p.depth_block < p.depth ? (row - s.row_begin) * PANEL : 0), scratch, ahead);
}

// A unit's rows of one run.
static void unit_rows(const Product& p, const Unit& unit, int64_t run, int64_t row_begin, int64_t row_end,
                      const Unit& next, const ProductScratch& scratch) {
  const bool whole = p.depth_block >= p.depth, kept = p.packed != nullptr;
  const int64_t packed_size = PANEL * (kept ? p.depth : p.depth_block), sums_size = whole ? 0 : p.chunk_rows * PANEL;
  const bfloat16* packed = scratch.panels;
  for (int64_t row = row_begin; row < row_end; row += p.chunk_rows)
    for (int64_t first = 0; first < p.depth; first += p.depth_block) {
      const int64_t depth = smaller(p.depth_block, p.depth - first);
      if (kept)
        packed = static_cast<const bfloat16*>(p.packed) + unit.panels->column * p.depth + first * PANEL;
      else if (!whole || row == unit.row_begin)
        pack_panels(p, unit.panels, unit.num_panels, first, depth, scratch.panels, packed_size);
      const Passage s{run, row, smaller(row + p.chunk_rows, row_end), first, depth, first + depth == p.depth,
                      unit.panels, unit.num_panels, packed, packed_size, sums_size};
      pass(p, s, next, scratch);
    }
}

// Every panel of the right factor, whole, in the order of columns.
static void pack_product(const Product& p, int64_t begin, int64_t end, void* to) {
  pack_panels(p, p.panels + begin, end - begin, 0, p.depth, static_cast<bfloat16*>(to) + begin * PANEL * p.depth,
              PANEL * p.depth);
}

// Units one after another, as threads come for them: a thread that its processor slows down takes fewer.
static void product(const Product& p, int64_t* next_unit, void* memory) {
  Scratch room{static_cast<uint8_t*>(memory)};
  ProductScratch scratch;
  scratch.panels = room.take<bfloat16>(p.packed == nullptr ? p.group * p.depth_block * PANEL : 0);
  scratch.left = room.take<bfloat16>(PRODUCT_ROWS * p.depth_block);
  scratch.sums = room.take<float>(p.depth_block < p.depth ? p.group * p.chunk_rows * PANEL : PRODUCT_ROWS * PANEL);
  scratch.term_sums = room.take<float>(PRODUCT_ROWS * PANEL);
  scratch.low_rank = room.take<bfloat16>(0);
  AmxEngine::begin();
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
  AmxEngine::end();
}

#endif

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
