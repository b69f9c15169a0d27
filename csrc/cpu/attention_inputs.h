// The tensors of one call of attention, its plan of blocks and tasks, and their division among threads.
#pragma once

#include <memory>

#include "attention_plan.h"
#include "operators.h"
#include "tensors.h"

namespace peftdyno {

// Padded keys that one part's tasks of one head read; head -1 for none.
struct SharedKeys {
  int64_t head = -1, offset = 0, keys = 0;
};

// Blocks, links and tasks of one layout.
struct Plan {
  std::vector<KeyBlock> blocks;
  std::vector<KeyLink> links;
  std::vector<QueryTask> tasks;
  std::vector<int64_t> costs;  // cumulative, a value more than tasks
  int64_t padded_keys = 0;

  Plan(const Tensor& segments, const Tensor& chain, int64_t groups, int64_t heads, int64_t window);

  // Padded rows of the largest task.
  int64_t task_rows(int64_t groups) const {
    int64_t rows = 0;
    for (const QueryTask& task : tasks) rows = std::max(rows, padded_to(task.count * groups, 32));
    return rows;
  }

  int64_t num_tasks() const { return static_cast<int64_t>(tasks.size()); }

  // Whether every task is one query, as in decoding.
  bool single_queries() const {
    return std::all_of(tasks.begin(), tasks.end(), [](const QueryTask& task) { return task.count == 1; });
  }

  // Parts of the tasks that the backward pass adds up apart: several a thread, so that a slow one can take fewer.
  int64_t num_parts() const {
    const int64_t threads = at::get_num_threads();
    return std::max<int64_t>(1, std::min(num_tasks(), threads == 1 ? 1 : 3 * threads));
  }

  // The padded keys of the head that part t of `parts` shares with the parts before it.
  SharedKeys borrowed_keys(int64_t t, int64_t parts) const;

  // The first task of part t of `parts`, so that each has a like share of the cost.
  int64_t share(int64_t t, int64_t parts) const {
    const int64_t wanted = costs.back() * t / parts;
    return std::lower_bound(costs.begin(), costs.end(), wanted) - costs.begin();
  }

  // Whether tasks have all of so many queries.
  bool covers(int64_t num_queries, int64_t heads) const {
    int64_t total = 0;
    for (const QueryTask& task : tasks) total += task.count;
    return total == num_queries * heads;
  }
};

// The plan of a layout. The last one is kept for each thread: the layers of a step have the same.
std::shared_ptr<const Plan> plan_of(const Tensor& segments, const Tensor& chain, int64_t groups, int64_t heads,
                                    int64_t window);

// Bytes of one thread's scratch: upper bounds of what the kernels take from it.
inline int64_t transpose_bytes(int64_t padded_width) {
  return padded_to(2 * KEY_BLOCK * padded_width * 4 + 128, 64);
}

inline int64_t attention_forward_bytes(int64_t rows, int64_t padded_width) {
  const int64_t wider = std::max(padded_width, KEY_BLOCK);
  return padded_to(rows * (4 * padded_width + KEY_BLOCK + wider + 4) * 4 + KEY_BLOCK * padded_width * 4 + 16 * 64, 64);
}

inline int64_t attention_single_bytes(int64_t heads, int64_t padded_width) {
  return padded_to((2 * heads * (padded_width + 1) + 4 * (KEY_BLOCK + 16 * 16)) * 4 + 6 * 64, 64);
}

inline int64_t attention_backward_bytes(int64_t rows, int64_t padded_width) {
  const int64_t wider = std::max(padded_width, KEY_BLOCK);
  const int64_t values = rows * (6 * padded_width + 4 * KEY_BLOCK + wider + 3) + KEY_BLOCK * padded_width;
  return padded_to(values * 4 + 20 * 64, 64);
}

inline Tensor with_unit_heads(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
}

// The tensors of one call as the kernels see them. `Inputs` owns what `task` points to.
struct Inputs {
  Tensor q, k, v, prefix_k, prefix_v;
  std::shared_ptr<const Plan> held_plan;
  const Plan& plan;
  Attention task{};

  Inputs(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const OptionalTensor& pk,
         const OptionalTensor& pv, const Tensor& segments, const Tensor& chain, double scale, int64_t window,
         double softcap)
      : q(with_unit_heads(q_any)),
        k(with_unit_heads(k_any)),
        v(with_unit_heads(v_any)),
        held_plan(plan_of(segments, chain, groups_of(q, k, v), k.size(1), window)),
        plan(*held_plan) {
    const int64_t groups = q.size(1) / k.size(1);
    TORCH_CHECK(scale > 0, "attention with a scale of ", scale);
    task.bf16 = is_bf16(q);
    task.groups = groups;
    task.width = q.size(2);
    task.padded_width = padded_to(task.width, 32);
    task.q = {q.data_ptr(), q.stride(0)};
    task.k = {k.data_ptr(), k.stride(0)};
    task.v = {v.data_ptr(), v.stride(0)};
    task.q_head_stride = q.stride(1);
    task.k_head_stride = k.stride(1);
    task.v_head_stride = v.stride(1);
    task.num_keys = k.size(0);
    if (pk.has_value()) set_prefix(*pk, *pv);
    task.scale = static_cast<float>(scale);
    task.softcap = static_cast<float>(softcap);
    task.window = window;
    task.blocks = plan.blocks.data();
    task.num_blocks = static_cast<int64_t>(plan.blocks.size());
    task.padded_keys = plan.padded_keys;
    task.links = plan.links.data();
    task.tasks = plan.tasks.data();
    task.num_queries = q.size(0);
    const int64_t rows_in_memory = task.num_keys + (pk.has_value() ? prefix_k.size(0) : 0);
    for (const KeyBlock& block : plan.blocks)
      TORCH_CHECK(block.row >= 0 && block.row + block.count <= rows_in_memory, "a chain names keys that do not exist");
    for (const QueryTask& t : plan.tasks) {
      TORCH_CHECK(t.row >= 0 && t.row + t.count <= task.num_queries, "a segment names queries that do not exist");
    }
    task.task_rows = plan.task_rows(groups);
  }

  // Query heads that share a key head.
  static int64_t groups_of(const Tensor& q, const Tensor& k, const Tensor& v) {
    const int64_t heads = q.size(1), key_heads = k.size(1);
    TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " query heads do not share ", key_heads, " key heads");
    TORCH_CHECK(k.sizes() == v.sizes() && k.size(2) == q.size(2), "keys of ", k.sizes(), " and values of ", v.sizes(),
                " for queries of ", q.sizes());
    const auto type = q.scalar_type();
    TORCH_CHECK(k.scalar_type() == type && v.scalar_type() == type, "types of q, k and v differ");
    return heads / key_heads;
  }

  void set_prefix(const Tensor& pk, const Tensor& pv) {
    prefix_k = pk.to(k.scalar_type()).contiguous();
    prefix_v = pv.to(v.scalar_type()).contiguous();
    task.prefix_k = {prefix_k.data_ptr(), prefix_k.stride(0)};
    task.prefix_v = {prefix_v.data_ptr(), prefix_v.stride(0)};
    task.prefix_head_stride = prefix_k.stride(1);
  }

  int64_t heads() const { return k.size(1); }

  // Memory for the transposes of the keys or the values, for every head.
  Tensor transposes() const {
    const int64_t element = kernels().operand_bytes(task.bf16);
    return at::empty({heads() * task.padded_keys * task.padded_width * element}, k.options().dtype(at::kByte));
  }

  // (head, block) pairs.
  int64_t num_blocks() const { return heads() * task.num_blocks; }

  // Scratch of every thread, for transposing and for tasks that need so many bytes.
  Tensor scratch(int64_t task_bytes) const {
    const int64_t bytes = std::max(transpose_bytes(task.padded_width), task_bytes);
    return at::empty({threads(), bytes}, k.options().dtype(at::kByte));
  }

  // Threads worth starting.
  int64_t threads() const { return threads_for(std::max(plan.num_tasks(), num_blocks())); }
};

}  // namespace peftdyno
