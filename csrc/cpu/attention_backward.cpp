// Operator `attention_backward` of kernels/attention.py.
//
// One pass over the tasks gives dq and adds to dk and dv. A task belongs to one key head and the tasks are sorted by
// head, so a thread shares at most its first head with the threads before it; it adds that part to memory of its own,
// which is added in the threads' order at the end. The result depends on the number of threads only.
#include <ATen/ops/zeros_like.h>

#include "attention_inputs.h"

namespace peftdyno {
namespace {

// The part of one thread's gradients that belongs to a head an earlier thread began.
struct Borrowed {
  SharedKeys keys;
  Tensor k, v;
};

Borrowed borrow(const Inputs& in, int64_t thread, int64_t threads) {
  Borrowed result{in.plan.borrowed_keys(thread, threads), {}, {}};
  if (result.keys.head < 0) return result;
  result.k = at::zeros({result.keys.keys * in.task.padded_width}, in.k.options().dtype(at::kFloat));
  result.v = at::zeros_like(result.k);
  return result;
}

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
  in.transpose();
  const int64_t threads = useful_threads(in.plan);
  const Tensor scratch = in.scratch(threads, attention_backward_bytes(task.task_rows, d));
  const Tensor sums = empty_float({2, key_heads, task.padded_keys * d}, q);
  at::parallel_for(0, sums.numel(), 16384, [&](int64_t begin, int64_t end) {
    std::fill(sums.data_ptr<float>() + begin, sums.data_ptr<float>() + end, 0.0f);
  });
  const Tensor all_k = sums.select(0, 0), all_v = sums.select(0, 1);
  std::vector<Borrowed> borrowed;
  for (int64_t t = 0; t < threads; ++t) borrowed.push_back(borrow(in, t, threads));
  in.for_shares(threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const Borrowed& own = borrowed[thread];
    const bool some = own.keys.head >= 0;
    const KeyGradients target{all_k.data_ptr<float>(), all_v.data_ptr<float>(), some ? own.k.data_ptr<float>() : nullptr,
                              some ? own.v.data_ptr<float>() : nullptr, own.keys.head, own.keys.offset};
    kernels().attention_backward(task, target, begin, end, scratch.data_ptr<uint8_t>() + thread * scratch.size(1));
  });
  for (const Borrowed& own : borrowed) {
    if (own.keys.head < 0) continue;
    all_k.select(0, own.keys.head).narrow(0, own.keys.offset * d, own.keys.keys * d).add_(own.k);
    all_v.select(0, own.keys.head).narrow(0, own.keys.offset * d, own.keys.keys * d).add_(own.v);
  }
  const KeyGradientRows rows{all_k.data_ptr<float>(), all_v.data_ptr<float>(), rows_of(dqkv), heads * width,
                             (heads + key_heads) * width, dprefix_k.data_ptr<float>(), dprefix_v.data_ptr<float>(),
                             key_heads * width};
  at::parallel_for(0, key_heads * task.num_blocks, 4, [&](int64_t begin, int64_t end) {
    kernels().attention_store_keys(task, rows, begin, end);
  });
  zero_uncovered(in, dqkv, dprefix_k, dprefix_v);
  return {dqkv, dprefix_k, dprefix_v};
}

}  // namespace peftdyno
