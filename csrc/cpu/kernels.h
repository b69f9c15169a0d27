// The table of row and block kernels: one table an instruction set, chosen once when the library loads.
//
// Everything below this line of the library is plain C++ without PyTorch, compiled once for each instruction set;
// everything above (the files named after an operator) allocates, checks and divides the work among threads.
#pragma once

#include <cstdint>

namespace peftdyno {

inline int64_t padded_to(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

inline int64_t ratio_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct bfloat16 {
  uint16_t bits;
};

// Rows of a matrix in memory: `stride` elements from a row to the next.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// A vector for every run of a bank: the rows offsets[j] to offsets[j + 1] of a matrix use values + j * width.
struct RunVectors {
  const float* values = nullptr;
  const int64_t* offsets = nullptr;
  int64_t num_runs = 1;
};

struct NormForward {
  bool bf16;
  int64_t width;
  Rows x, residual, y, h;
  RunVectors weight;  // the offset already added
  float* rstd;
  float eps;
};

struct NormBackward {
  bool bf16;
  int64_t width;
  Rows dy, dh, h, dx;
  RunVectors weight;
  const float* rstd;
  float* dweight;  // [R, width] of this thread, or null
};

enum class Activation { silu, gelu_tanh };

struct GluForward {
  bool bf16;
  int64_t width;
  Activation activation;
  Rows gate_up, y;
  RunVectors scale;  // values null without one
};

struct GluBackward {
  bool bf16;
  int64_t width;
  Activation activation;
  Rows dy, gate_up, dgate_up;
  RunVectors scale;
  float* dscale;  // [R, width] of this thread, or null
};

struct Rotary {
  bool bf16;
  int64_t num_heads, half;
  Rows qkv;
  const float *cos, *sin;
  bool inverse;
};

struct BankAffine {
  bool bf16, multiply;
  int64_t width;
  Rows y;
  RunVectors values;
};

struct ColumnSums {
  bool bf16;
  int64_t width;
  Rows dy, before;  // before.data null without one
  const int64_t* offsets;
  int64_t num_runs;
  float* sums;  // [R, width] of this thread
};

struct ScaleRows {
  bool bf16;
  int64_t width;
  Rows x, y;
  const float* factors;
};

struct AdamW {
  float *p, *m, *v;
  const float* g;
  float clip, beta1, beta2, fresh1, fresh2;  // fresh = 1 - beta
  float step_size, root_correction, eps, keep;
};

struct LabelLoss {
  bool bf16, need_gradient;
  int64_t vocabulary;
  Rows logits;  // overwritten by their gradient
  const int64_t* targets;
  float* loss;
  float softcap;
};

constexpr int64_t NF4_BLOCK = 64;  // elements of a weight in 4 bits that share an absolute maximum

struct Nf4Dequantise {
  bool bf16;
  const uint8_t* codes;
  const float *absmax, *codebook;
  void* out;
};

struct Lora;
struct Product;
struct LoraTerm;
struct LoraTask;
struct LoraStrip;
struct Attention;
struct KeyGradients;
struct KeyGradientRows;

struct Kernels {
  const char* name;
  void (*norm_forward)(const NormForward&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end);
  void (*glu_forward)(const GluForward&, int64_t begin, int64_t end);
  void (*glu_backward)(const GluBackward&, int64_t begin, int64_t end);
  void (*rotary)(const Rotary&, int64_t begin, int64_t end);
  void (*bank_affine)(const BankAffine&, int64_t begin, int64_t end);
  void (*column_sums)(const ColumnSums&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
  void (*adamw)(const AdamW&, int64_t begin, int64_t end);
  void (*label_loss)(const LabelLoss&, int64_t begin, int64_t end);
  void (*nf4_dequantise)(const Nf4Dequantise&, int64_t begin, int64_t end);  // of blocks
  int64_t (*operand_bytes)(bool bf16);  // of one element of an operand of the block products
  void (*product)(const Product&, int64_t* next_unit, void* scratch);  // of bf16; null where the library is better
  void (*pack_product)(const Product&, int64_t begin, int64_t end, void* to);  // null where weights are widened
  void (*lora_pack)(const Lora&, const LoraTerm&, bool up, void* scratch);  // of A, or with `up` of B
  void (*lora_forward)(const Lora&, const LoraTask&, void* scratch);
  void (*lora_output_gradients)(const Lora&, const LoraTask&, void* scratch);
  void (*lora_strip)(const Lora&, const LoraStrip&, void* scratch);
  void (*attention_transpose)(const Attention&, int64_t begin, int64_t end, void* scratch);
  void (*attention_forward)(const Attention&, int64_t begin, int64_t end, void* scratch);
  void (*attention_single)(const Attention&, int64_t task, int64_t heads, void* scratch);  // of one query; its head and the next
  void (*attention_backward)(const Attention&, const KeyGradients&, int64_t begin, int64_t end, void* scratch);
  void (*attention_store_keys)(const Attention&, const KeyGradientRows&, int64_t begin, int64_t end);
};

// The table in force: the best that the processor has, or the one named by PEFTDYNO_ISA.
const Kernels& kernels();

// Put another in force: amx, avx512, avx2 or portable; the best for an empty name. Throws std::runtime_error.
void use_isa(const char* name);

namespace portable {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}

}  // namespace peftdyno
