// Operator `attention` of kernels/attention.py.
#include "attention_inputs.h"

namespace peftdyno {
namespace {

// Queries alone in their segments. The heads of one, whose keys lie side by side in memory, go together unless that
// leaves threads idle.
void single(const Inputs& in) {
  const int64_t queries = in.plan.num_tasks() / in.heads();
  const int64_t together = queries >= 4 * in.threads() ? in.heads() : 1;
  const Tensor scratch = in.scratch(attention_single_bytes(in.q.size(1), in.task.padded_width));
  Phase units(in.plan.num_tasks() / together);
  in_parallel(in.threads(), [&](int64_t thread) {
    units.work([&](int64_t i) {
      kernels().attention_single(in.task, i, together, part_of(scratch, thread));
    });
  });
}

void blocked(Inputs& in) {
  Attention& task = in.task;
  const Tensor v_transposed = in.transposes();
  task.v_transposed = v_transposed.data_ptr();
  const Tensor scratch = in.scratch(attention_forward_bytes(task.task_rows, task.padded_width));
  Phase transposes(in.num_blocks()), tasks(in.plan.num_tasks());
  in_parallel(in.threads(), [&](int64_t thread) {
    void* mine = part_of(scratch, thread);
    transposes.finish([&](int64_t i) { kernels().attention_transpose(task, i, i + 1, mine); });
    tasks.work([&](int64_t i) { kernels().attention_forward(task, i, i + 1, mine); });
  });
}

}  // namespace

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
  in.plan.single_queries() ? single(in) : blocked(in);
  return {out, lse};
}

}  // namespace peftdyno
