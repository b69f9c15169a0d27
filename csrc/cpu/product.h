// Large products for the operators: by panels of our own where the processor has tiles, else by the library.
#pragma once

#include "lora_call.h"
#include "product_plan.h"
#include "tensors.h"

namespace peftdyno {

// Options of a product beside its factors.
struct ProductOptions {
  bool transposed = false;       // the right factor is [columns, depth]
  bool accumulate = false;       // to what is in the result
  const Tensor* bias = nullptr;  // [columns]
  const LoraCall* lora = nullptr;  // whose u and s B^T join; only where `own_product` holds
};

// Whether a product of such shapes is ours (docs/decisions/cpu-products.md): in bf16, where the processor has tiles.
bool own_product(bool bf16, int64_t rows, int64_t depth);

// W as panels for x W^T; undefined where such products are not ours.
Tensor pack_whole(const Tensor& weight);

// out [rows, columns] (+)= left right (+ bias)
void product(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options);

// Bytes that a product of ours holds for all threads where the right factor is not kept as panels; `rank` is the largest
// of its low-rank terms or 0.
int64_t product_bytes(int64_t rows, int64_t depth, int64_t columns, int64_t rank);

}  // namespace peftdyno
