// Large products for the operators: by panels of our own where the table of kernels has them, else by the library.
#pragma once

#include <vector>

#include "lora_plan.h"
#include "phases.h"
#include "product_plan.h"
#include "tensors.h"

namespace peftdyno {

// Low-rank terms of every module and run that join a large product.
struct LowRankTerms {
  std::vector<LowRankTerm> terms;  // module after module, the runs of one together
  std::vector<int64_t> run_offsets;
  bool everywhere;  // every module reaches all columns, else each its own

  int64_t num_runs() const { return static_cast<int64_t>(run_offsets.size()) - 1; }
  int64_t num_modules() const { return static_cast<int64_t>(terms.size()) / num_runs(); }
};

// Options of a product beside its factors.
struct ProductOptions {
  bool transposed = false;       // the right factor is [columns, depth]
  bool accumulate = false;       // to what is in the result
  const Tensor* bias = nullptr;  // [columns]
  const LowRankTerms* low_rank = nullptr;  // only where `own_product` holds
};

// Sizes by which a large product of ours is divided.
struct ProductShape {
  int64_t rows, depth, columns;
  int64_t num_modules = 0, largest_rank = 0;  // of low-rank terms
};

// A product of ours made ready, for the threads of one parallel region to share.
class OwnProduct {
 public:
  OwnProduct(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options);

  // Threads that have work.
  int64_t threads() const { return threads_; }

  // One thread's part, with scratch of its own.
  void work(void* scratch) { kernels().product(product_, &next_unit_, scratch); }

  // Bytes of one thread's scratch.
  int64_t scratch_bytes() const { return scratch_bytes_; }

 private:
  std::vector<Panel> panels_;
  Tensor packed_;  // of the right factor, held while threads read it
  std::vector<int64_t> run_offsets_;
  Product product_;
  int64_t threads_, scratch_bytes_, next_unit_ = 0;
};

// Whether a product of such shapes is ours (docs/decisions/cpu-products.md): in bf16, on processors with AVX2 or more.
bool own_product(bool bf16, int64_t rows, int64_t depth);

// Whether weights of a depth can be kept as panels: where the processor multiplies bf16.
bool has_panels(bool bf16, int64_t depth);

// W as panels for x W^T, or with `backward` for dy W; undefined where there are none.
Tensor pack_whole(const Tensor& weight, bool backward);

// out [rows, columns] (+)= left right (+ bias)
void product(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options);

// (threads, bytes that each holds) of a product of ours where the right factor is not kept as panels.
std::tuple<int64_t, int64_t> product_bytes(const ProductShape& shape);

}  // namespace peftdyno
