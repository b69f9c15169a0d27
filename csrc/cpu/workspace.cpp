// Bytes that operators hold during a call beside their arguments and results, from the sizes they allocate by.
#include "attention_inputs.h"
#include "lora_call.h"
#include "operators.h"
#include "product.h"

namespace peftdyno {

int64_t attention_workspace(const Tensor& segments, const Tensor& chain, int64_t heads, int64_t key_heads,
                            int64_t width, int64_t window, bool bf16, bool backward) {
  const auto plan = plan_of(segments, chain, heads / key_heads, key_heads, window);
  const int64_t element = kernels().operand_bytes(bf16), d = padded_to(width, 32);
  const int64_t keys = key_heads * plan->padded_keys * d, rows = plan->task_rows(heads / key_heads);
  const int64_t blocks = key_heads * static_cast<int64_t>(plan->blocks.size());
  const int64_t threads = threads_for(std::max(plan->num_tasks(), blocks));
  const bool single = !backward && plan->single_queries();
  const int64_t task = backward ? attention_backward_bytes(rows, d)
                       : single ? attention_single_bytes(heads, d)
                                : attention_forward_bytes(rows, d);
  const int64_t held = (single ? 0 : keys * element) + threads * std::max(transpose_bytes(d), task);
  if (!backward) return held;
  int64_t borrowed = 0;
  for (int64_t t = 0; t < plan->num_parts(); ++t) borrowed += plan->borrowed_keys(t, plan->num_parts()).keys;
  return held + 2 * 4 * (keys + borrowed * d);
}

int64_t product_workspace(int64_t rows, int64_t depth, int64_t columns, bool bf16) {
  if (!own_product(bf16, rows, depth)) return -1;
  const auto [threads, bytes] = product_bytes({rows, depth, columns});
  return threads * bytes;
}

namespace {

// Every thread's scratch beside a large product [tokens, depth] x [depth, columns] that the terms join where it is ours.
int64_t lora_scratch(const LoraShape& shape, int64_t depth, int64_t columns) {
  std::tuple<int64_t, int64_t> product{0, 0};
  if (depth > 0 && own_product(shape.lora.bf16, shape.lora.num_tokens, depth))
    product = product_bytes({shape.lora.num_tokens, depth, columns, shape.lora.num_modules, shape.largest_rank});
  const auto [threads, bytes] = shape.scratch(std::get<0>(product), std::get<1>(product));
  return threads * bytes;
}

}  // namespace

int64_t lora_workspace(int64_t out, int64_t width, IntArrayRef ranks, IntArrayRef rows, IntArrayRef run_offsets,
                       bool bf16) {
  const LoraShape shape(bf16, width, ranks, rows, run_offsets);
  return shape.packed_bytes(DOWN | UP_TRANSPOSED) + lora_scratch(shape, width, out);
}

int64_t lora_backward_workspace(int64_t out, int64_t width, IntArrayRef ranks, IntArrayRef rows,
                                IntArrayRef run_offsets, bool bf16, bool dropped, bool need_x) {
  const LoraShape shape(bf16, width, ranks, rows, run_offsets);
  const bool joined = need_x && own_product(bf16, shape.lora.num_tokens, out);
  return shape.packed_bytes(need_x ? UP | DOWN_ROWS : UP) + shape.gradient_bytes(joined && dropped) +
         lora_scratch(shape, need_x ? out : 0, width);
}

}  // namespace peftdyno
