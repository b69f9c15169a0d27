// The low-rank part of one adapted product as the kernels see it: plain values, no tensors.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace peftdyno {

constexpr int64_t LORA_ROWS = 64;    // tokens of a task at most
constexpr int64_t LORA_STRIP = 128;  // columns held at a time; masks are drawn for whole strips
constexpr int64_t LORA_CHUNK = 256;  // tokens whose part of a strip is held at a time
constexpr int64_t PUT_ROWS = 32;     // fp32 rows of a strip that are held in the first-level cache
constexpr int64_t STRIP_WORDS = LORA_STRIP / 32;  // of a token's mask

// One module of one run: its factors as operands of the block products, its columns of dy and of u.
struct LoraTerm {
  int64_t rank, padded_rank;      // padded to 32
  int64_t out_column, out_width;  // its columns of y, which are its rows of W
  int64_t u_column;
  float up_scale;  // s, the scale of u B^T
  uint64_t key;    // dropout's
  const float *a, *b;  // [r, in], [out_m, r]
  // Right operands; null where not wanted. Dropout's scale is in A and s is in B.
  void* down;           // A^T [in, r]
  void* down_rows;      // A [r, in], strip after strip
  void* up;             // B [out_m, r]
  void* up_transposed;  // B^T [r, out_m], strip after strip
  // The backward pass's: left operands, the transposes [r, tokens] chunk after chunk of the run's tokens.
  void* du;  // [N, padded_rank]
  void *du_transposed, *u_transposed;
  uint32_t* masks;  // [strips of x, N, STRIP_WORDS], for the product that gives dx; null where not wanted
  float *da, *db;   // [r, in], [out_m, r]
};

// Some tokens of one run, for every module.
struct LoraTask {
  int64_t run, row, rows;
};

// Some columns of the gradients of one run's factors: of every dA, or of one module's dB^T.
struct LoraStrip {
  int64_t run, module, column;  // module -1: every dA
};

struct Lora {
  bool bf16, dropped;
  int64_t width;  // of x
  int64_t num_tokens;
  uint16_t threshold;  // of 65536
  float keep_scale;    // 1 / (1 - threshold / 65536), or 1
  const int64_t* streams;
  const LoraTerm* terms;  // module after module, the runs of one together
  int64_t num_modules, num_runs;
  const int64_t* run_offsets;
  Rows x, u;
  Rows y;       // y += s u B^T where its data is not null
  Rows dy, dx;  // dx = mask (du A) where its data is not null
};

// A low-rank term of one run in a large product: left right, where the mask lets it, on columns of the result.
struct LowRankTerm {
  int64_t column, width;
  int64_t rank, padded_rank;
  Rows left;              // [rows, rank] from its first column on
  bool left_bf16;         // its type, else that of operands
  const void* right;      // [rank, width], strip after strip
  const uint32_t* masks;  // [strips, rows, STRIP_WORDS] or null
};

}  // namespace peftdyno
