// A large product as the kernels see it: plain values, no tensors.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace peftdyno {

constexpr int64_t PANEL = 32;         // columns of the result computed together
constexpr int64_t PRODUCT_ROWS = 16;  // rows of a block

struct LowRankTerm;

// Some columns of the result, and which modules' low-rank terms reach all of them.
struct Panel {
  int64_t column, width;
  int64_t first_module, last_module;  // one beyond the last
};

// out [rows, columns] (+)= left [rows, depth] right, low-rank terms within; depth is a multiple of 32.
struct Product {
  int64_t rows, depth;
  Rows left, right, out;
  bool transposed;      // right is [columns, depth], else [depth, columns]
  bool accumulate;      // to what is in out
  const void* bias;     // of the type of out, or null
  const LowRankTerm* terms;  // module after module, the runs of one together
  int64_t largest_rank;      // of them, padded
  const void* packed;   // every panel of the right factor at its whole depth, or null
  const Panel* panels;
  int64_t num_panels;
  int64_t depth_block;  // depth whose panels are packed at a time
  int64_t chunk_rows;   // rows that pass by the packed panels together
  int64_t group;        // panels packed together
  int64_t row_shares;   // parts of the rows for which panels are packed anew
  const int64_t* run_offsets;
  int64_t num_runs;

  int64_t groups() const { return ratio_up(num_panels, group); }
  int64_t num_units() const { return row_shares * groups(); }
};

}  // namespace peftdyno
