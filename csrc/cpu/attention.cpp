// Operator `attention` of kernels/attention.py.
#include "attention_inputs.h"

namespace peftdyno {
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& prefix_k,
                                     const OptionalTensor& prefix_v, const Tensor& segments, const Tensor& chain,
                                     double scale, int64_t window, double softcap, int64_t spare) {
  Inputs in(q, k, v, prefix_k, prefix_v, segments, chain, scale, window, softcap);
  Attention& task = in.task;
  Tensor out = empty_with_spare(q.size(0), q.size(1) * q.size(2), spare, q);
  const bool covered = in.plan.covers(q.size(0), in.heads());
  Tensor lse = empty_float({q.size(1), q.size(0)}, q);
  if (!covered) lse.zero_();
  task.out = rows_of(out);
  task.lse = lse.data_ptr<float>();
  const Tensor v_transposed = in.transposes();
  task.v_transposed = v_transposed.data_ptr();
  const int64_t bytes = attention_forward_bytes(task.task_rows, task.padded_width);
  const Tensor scratch = in.scratch(bytes);
  Phase transposes(in.num_blocks()), tasks(in.plan.num_tasks());
  in_parallel(in.threads(), [&](int64_t thread) {
    void* mine = part_of(scratch, thread);
    transposes.finish([&](int64_t i) { kernels().attention_transpose(task, i, i + 1, mine); });
    tasks.work([&](int64_t i) { kernels().attention_forward(task, i, i + 1, mine); });
  });
  return {out, lse};
}

}  // namespace peftdyno
