// Bytes that operators hold during a call beside their arguments and results, from the sizes they allocate by.
#include "attention_inputs.h"
#include "lora_call.h"
#include "operators.h"
#include "product.h"

namespace peftdyno {

int64_t attention_workspace(const Tensor& segments, const Tensor& chain, int64_t heads, int64_t key_heads,
                            int64_t width, int64_t window, bool bf16, bool backward) {
  const Plan plan(segments, chain, heads / key_heads, key_heads, window);
  const int64_t element = kernels().operand_bytes(bf16), d = padded_to(width, 32), threads = useful_threads(plan);
  const int64_t keys = key_heads * plan.padded_keys * d, rows = plan.task_rows(heads / key_heads);
  const int64_t transposing = at::get_num_threads() * transpose_bytes(d);
  if (!backward) return keys * element + std::max(transposing, threads * attention_forward_bytes(rows, d));
  int64_t borrowed = 0;
  for (int64_t t = 0; t < threads; ++t) borrowed += plan.borrowed_keys(t, threads).keys;
  const int64_t gradients = 2 * 4 * (keys + borrowed * d);
  return keys * element + std::max(transposing, threads * attention_backward_bytes(rows, d) + gradients);
}

int64_t product_workspace(int64_t rows, int64_t depth, int64_t columns, int64_t rank, bool bf16) {
  return own_product(bf16, rows, depth) ? product_bytes(rows, depth, columns, rank) : -1;
}

std::tuple<int64_t, int64_t> lora_workspace(int64_t width, IntArrayRef ranks, IntArrayRef rows, IntArrayRef run_offsets,
                                            bool bf16) {
  const LoraShape shape(bf16, width, ranks, rows, run_offsets);
  const int64_t packed = shape.packed_bytes(DOWN | UP_TRANSPOSED);
  const int64_t packing = shape.packing_threads() * shape.packing_bytes();
  return {packed, packed + std::max(packing, shape.threads() * shape.scratch_bytes())};
}

std::tuple<int64_t, int64_t> lora_backward_workspace(int64_t width, IntArrayRef ranks, IntArrayRef rows,
                                                     IntArrayRef run_offsets, bool bf16, bool need_x) {
  const LoraShape shape(bf16, width, ranks, rows, run_offsets);
  const int64_t packed = shape.packed_bytes(need_x ? UP | DOWN_ROWS : UP);
  const int64_t sums = shape.threads() * shape.gradient_size * 4;
  const int64_t packing = shape.packing_threads() * shape.packing_bytes();
  return {packed + sums, packed + std::max(packing, sums + shape.threads() * shape.scratch_bytes())};
}

}  // namespace peftdyno
