// Operator `attention_backward` of kernels/attention.py.
//
// One pass over the tasks gives dq and adds to dk and dv. The tasks, sorted by key head, are cut into parts; a part shares
// at most its first head with the parts before it and adds what belongs to that head to memory of its own, which is
// added in the parts' order at the end. The result depends on the number of parts only, which follows from the threads'.
#include "attention_inputs.h"

namespace peftdyno {
namespace {

// What parts add to heads that an earlier part began: zeros at first.
struct Borrowed {
  std::vector<SharedKeyGradients> parts;
  Tensor values;

  explicit Borrowed(const Inputs& in) {
    const int64_t count = in.plan.num_parts(), width = in.task.padded_width;
    std::vector<SharedKeys> keys;
    int64_t total = 0;
    for (int64_t t = 0; t < count; ++t) {
      keys.push_back(in.plan.borrowed_keys(t, count));
      total += 2 * keys.back().keys * width;
    }
    values = empty_float({total}, in.k);
    float* next = values.data_ptr<float>();
    for (const SharedKeys& own : keys) {
      parts.push_back({own.head, own.offset, own.keys, next, next + own.keys * width});
      next += 2 * own.keys * width;
    }
  }
};

// Zero the rows that no task and no block of keys writes.
void zero_uncovered(const Inputs& in, Tensor& dqkv, Tensor& dprefix_k, Tensor& dprefix_v) {
  const int64_t n = dqkv.size(0), num_keys = in.task.num_keys, q_columns = in.q.size(1) * in.q.size(2);
  std::vector<char> queries(n, 0), keys(num_keys + dprefix_k.size(0), 0);
  for (const QueryTask& t : in.plan.tasks) std::fill_n(queries.begin() + t.row, t.count, 1);
  for (const KeyBlock& b : in.plan.blocks) std::fill_n(keys.begin() + b.row, b.count, 1);
  for (int64_t row = 0; row < n; ++row) {
    if (!queries[row]) dqkv.select(0, row).narrow(0, 0, q_columns).zero_();
    if (!keys[row]) dqkv.select(0, row).narrow(0, q_columns, dqkv.size(1) - q_columns).zero_();
  }
  for (int64_t row = num_keys; row < static_cast<int64_t>(keys.size()); ++row) {
    if (keys[row]) continue;
    dprefix_k.select(0, row - num_keys).zero_();
    dprefix_v.select(0, row - num_keys).zero_();
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_any, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const OptionalTensor& prefix_k,
                                                      const OptionalTensor& prefix_v, const Tensor& out_any,
                                                      const Tensor& lse_any, const Tensor& segments,
                                                      const Tensor& chain, double scale, int64_t window,
                                                      double softcap, int64_t spare) {
  Inputs in(q, k, v, prefix_k, prefix_v, segments, chain, scale, window, softcap);
  Attention& task = in.task;
  const Tensor dout = with_unit_columns(dout_any), out = with_unit_columns(out_any), lse = lse_any.contiguous();
  TORCH_CHECK(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(), "types differ");
  TORCH_CHECK(q.size(0) == k.size(0), "the gradient of fused rows needs as many queries as keys");
  const int64_t heads = q.size(1), key_heads = in.heads(), width = q.size(2), d = task.padded_width;
  Tensor dqkv = empty_with_spare(q.size(0), (heads + 2 * key_heads) * width, spare, q);
  const int64_t extra = prefix_k.has_value() ? prefix_k->size(0) : 0;
  Tensor dprefix_k = empty_float({extra, key_heads, width}, q), dprefix_v = empty_float({extra, key_heads, width}, q);
  task.dout = rows_of(dout);
  task.out = rows_of(out);
  task.lse = lse.data_ptr<float>();
  task.dq = rows_of(dqkv);
  task.dq_head_stride = width;
  const Tensor k_transposed = in.transposes();
  task.k_transposed = k_transposed.data_ptr();
  const Tensor scratch = in.scratch(attention_backward_bytes(task.task_rows, d));
  const Tensor sums = empty_float({2, key_heads, task.padded_keys * d}, q);
  float *all_k = sums.data_ptr<float>(), *all_v = all_k + key_heads * task.padded_keys * d;
  const Borrowed borrowed(in);
  const int64_t num_parts = static_cast<int64_t>(borrowed.parts.size());
  const KeyGradientRows rows{all_k, all_v, borrowed.parts.data(), num_parts, rows_of(dqkv), heads * width,
                             (heads + key_heads) * width, dprefix_k.data_ptr<float>(), dprefix_v.data_ptr<float>(),
                             key_heads * width};
  Phase transposes(in.num_blocks()), parts(num_parts), stores(in.num_blocks());
  in_parallel(in.threads(), [&](int64_t thread) {
    void* mine = part_of(scratch, thread);
    transposes.finish([&](int64_t i) {
      kernels().attention_transpose(task, i, i + 1, mine);
      const KeyBlock& block = in.plan.blocks[i % task.num_blocks];
      const int64_t at = (i / task.num_blocks * task.padded_keys + block.offset) * d;
      for (float* target : {all_k, all_v}) std::fill_n(target + at, block.padded * d, 0.0f);
    });
    parts.finish([&](int64_t t) {
      const SharedKeyGradients& own = borrowed.parts[t];
      std::fill_n(own.k, 2 * own.keys * d, 0.0f);
      const KeyGradients target{all_k, all_v, own};
      kernels().attention_backward(task, target, in.plan.share(t, num_parts), in.plan.share(t + 1, num_parts), mine);
    });
    stores.work([&](int64_t i) { kernels().attention_store_keys(task, rows, i, i + 1); });
  });
  zero_uncovered(in, dqkv, dprefix_k, dprefix_v);
  return {dqkv, dprefix_k, dprefix_v};
}

}  // namespace peftdyno
