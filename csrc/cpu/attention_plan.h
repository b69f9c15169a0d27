// How attention over a forest of segments is cut into blocks of keys and tasks of queries.
//
// Plain values shared by the planner (attention.cpp) and the kernels (attention_kernel.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace peftdyno {

constexpr int64_t KEY_BLOCK = 64;

// Up to KEY_BLOCK consecutive key rows. `offset` is the number of padded keys before it in the packed arrays.
struct KeyBlock {
  int64_t row, count, padded, offset;
};

// Blocks first to last - 1 as one segment sees them: the key at row t has position t + shift.
struct KeyLink {
  int64_t first, last, shift;
};

// Some consecutive queries of one segment, all the query heads of one key head.
struct QueryTask {
  int64_t row, count, position;
  int64_t first_link, last_link;
  int64_t head;
};

struct Attention {
  bool bf16;
  int64_t groups, width, padded_width;  // query heads a key head; columns of a head
  Rows q, k, v;                         // row stride in elements, heads `head_stride` columns apart
  int64_t q_head_stride, k_head_stride, v_head_stride;
  int64_t num_keys;  // rows from here on are rows of the prefix tensors
  Rows prefix_k, prefix_v;
  int64_t prefix_head_stride;
  float scale, softcap;
  int64_t window;
  const KeyBlock* blocks;
  int64_t num_blocks, padded_keys;
  const KeyLink* links;
  const QueryTask* tasks;
  Rows out;    // [N, H d]
  float* lse;  // [H, N]
  int64_t num_queries;
  int64_t task_rows;  // padded number of rows of the largest task
  void* k_transposed;  // left operands [padded_width, padded] of each block; null where not wanted
  void* v_transposed;
  Rows dout, dq;
  int64_t dq_head_stride;
};

// Some padded keys of one head, from `offset` on, and gradients of theirs; head -1 for none.
struct SharedKeyGradients {
  int64_t head, offset, keys;
  float *k, *v;
};

// Where one part of the backward pass adds the gradients of keys and values: fp32 [padded, padded_width] for each block.
// Those of its shared head go to `own`; the others go to their place in `all`.
struct KeyGradients {
  float *all_k, *all_v;
  SharedKeyGradients own;
};

// Where those gradients end: rows of the fused gradient from the two columns on, and of the prefix tensors in fp32.
struct KeyGradientRows {
  float *k, *v;
  const SharedKeyGradients* parts;  // to be added, in order
  int64_t num_parts;
  Rows fused;
  int64_t k_column, v_column;
  float *prefix_k, *prefix_v;
  int64_t prefix_stride;
};

}  // namespace peftdyno
