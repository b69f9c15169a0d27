// Operator `attention` of kernels/attention.py.
#include "attention_inputs.h"

namespace peftdyno {
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& prefix_k,
                                     const OptionalTensor& prefix_v, const Tensor& segments, const Tensor& chain,
                                     double scale, int64_t window, double softcap, int64_t spare) {
  Inputs in(q, k, v, prefix_k, prefix_v, segments, chain, scale, window, softcap);
  Attention& task = in.task;
  Tensor out = empty_with_spare(q.size(0), q.size(1) * q.size(2), spare, q);
  Tensor lse = at::zeros({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  task.out = rows_of(out);
  task.lse = lse.data_ptr<float>();
  const Tensor v_transposed = in.transposes();
  task.v_transposed = v_transposed.data_ptr();
  in.transpose();
  const int64_t threads = useful_threads(in.plan);
  const Tensor scratch = in.scratch(threads, attention_forward_bytes(task.task_rows, task.padded_width));
  in.for_shares(threads, [&](int64_t thread, int64_t begin, int64_t end) {
    kernels().attention_forward(task, begin, end, scratch.data_ptr<uint8_t>() + thread * scratch.size(1));
  });
  return {out, lse};
}

}  // namespace peftdyno
