// The low-rank part of one adapted product as the kernels see it: plain values, no tensors.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace peftdyno {

constexpr int64_t LORA_ROWS = 64;    // tokens of a task
constexpr int64_t LORA_STRIP = 128;  // columns of x held at a time; masks are drawn for whole strips

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
  int64_t gradient;     // where its sums begin among a thread's: dA [r, in], then dB^T [r, out_m], strip after strip
};

// Every thread's sums of the gradients, `size` values a thread.
struct LoraSums {
  const float* values;
  int64_t size, num_threads;
};

// Some tokens of one run, for every module.
struct LoraTask {
  int64_t run, row, rows;
};

struct Lora {
  bool bf16, dropped;
  int64_t width;  // of x
  uint16_t threshold;  // of 65536
  float keep_scale;    // 1 / (1 - threshold / 65536), or 1
  const int64_t* streams;
  const LoraTerm* terms;  // module after module, the runs of one together
  int64_t num_modules, num_runs;
  const LoraTask* tasks;
  Rows x, u;
  Rows y;                        // y += s u B^T where its data is not null
  Rows dy, dx;                   // dx = mask (du A) where its data is not null
};

}  // namespace peftdyno
