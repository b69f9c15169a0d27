// Cuts a layout of segments and chains into blocks of keys and tasks of queries.
#include <algorithm>
#include <array>
#include <set>

#include "attention_inputs.h"

namespace peftdyno {
namespace {

constexpr int64_t TASK_ROWS = 96;

struct Segment {
  int32_t row, queries, first, last;
};

struct ChainLink {
  int32_t row, keys, position;
};

// Key ranges of the links cut at every end of another, so that two blocks are the same rows or have none in common.
std::vector<int64_t> cuts(const ChainLink* chain, int64_t num_links) {
  std::set<int64_t> ends;
  for (int64_t i = 0; i < num_links; ++i) {
    ends.insert(chain[i].row);
    ends.insert(static_cast<int64_t>(chain[i].row) + chain[i].keys);
  }
  return {ends.begin(), ends.end()};
}

void add_blocks(Plan& plan, const ChainLink* chain, int64_t num_links) {
  const std::vector<int64_t> ends = cuts(chain, num_links);
  std::vector<char> covered(ends.size(), 0);
  for (int64_t i = 0; i < num_links; ++i) {
    auto at = std::lower_bound(ends.begin(), ends.end(), chain[i].row) - ends.begin();
    for (; static_cast<size_t>(at) + 1 < ends.size() && ends[at] < chain[i].row + chain[i].keys; ++at) covered[at] = 1;
  }
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    if (!covered[i]) continue;
    for (int64_t row = ends[i]; row < ends[i + 1]; row += KEY_BLOCK) {
      const int64_t count = std::min(KEY_BLOCK, ends[i + 1] - row), padded = padded_to(count, 32);
      plan.blocks.push_back({row, count, padded, plan.padded_keys});
      plan.padded_keys += padded;
    }
  }
}

void add_links(Plan& plan, const ChainLink* chain, int64_t num_links) {
  auto first_at = [&](int64_t row) {
    auto before = [](const KeyBlock& block, int64_t value) { return block.row < value; };
    return std::lower_bound(plan.blocks.begin(), plan.blocks.end(), row, before) - plan.blocks.begin();
  };
  for (int64_t i = 0; i < num_links; ++i) {
    const ChainLink& link = chain[i];
    plan.links.push_back({first_at(link.row), first_at(static_cast<int64_t>(link.row) + link.keys),
                          static_cast<int64_t>(link.position) - link.row});
  }
}

void add_tasks(Plan& plan, const Segment* segments, int64_t num_segments, const ChainLink* chain, int64_t groups,
               int64_t heads, int64_t window) {
  const int64_t queries_a_task = std::max<int64_t>(1, TASK_ROWS / groups);
  plan.costs.push_back(0);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < num_segments; ++i) {
      const Segment& s = segments[i];
      if (s.queries == 0) continue;
      TORCH_CHECK(s.last > s.first, "a segment with queries needs a chain of keys");
      const ChainLink& own = chain[s.last - 1];
      const int64_t position = static_cast<int64_t>(own.position) + own.keys - s.queries;
      for (int64_t q = 0; q < s.queries; q += queries_a_task) {
        const int64_t count = std::min<int64_t>(queries_a_task, s.queries - q);
        plan.tasks.push_back({s.row + q, count, position + q, s.first, s.last, head});
        int64_t keys = position + q + count;
        if (window != 0) keys = std::min(keys, window + count);
        plan.costs.push_back(plan.costs.back() + count * groups * (keys + KEY_BLOCK));
      }
    }
}

}  // namespace

Plan::Plan(const Tensor& segments, const Tensor& chain, int64_t groups, int64_t heads, int64_t window) {
  const auto* s = reinterpret_cast<const Segment*>(segments.data_ptr<int32_t>());
  const auto* c = reinterpret_cast<const ChainLink*>(chain.data_ptr<int32_t>());
  add_blocks(*this, c, chain.size(0));
  add_links(*this, c, chain.size(0));
  add_tasks(*this, s, segments.size(0), c, groups, heads, window);
}

std::shared_ptr<const Plan> plan_of(const Tensor& segments, const Tensor& chain, int64_t groups, int64_t heads,
                                    int64_t window) {
  struct Kept {
    std::vector<int32_t> layout;
    std::array<int64_t, 5> sizes;
    std::shared_ptr<const Plan> plan;
  };
  static thread_local Kept kept;
  const std::array<int64_t, 5> sizes{segments.size(0), chain.size(0), groups, heads, window};
  std::vector<int32_t> layout;
  for (const Tensor* table : {&segments, &chain}) {
    TORCH_CHECK(table->scalar_type() == at::kInt && table->is_contiguous() && table->device().is_cpu(),
                "segments and chain are contiguous int32 tensors on the CPU");
    layout.insert(layout.end(), table->data_ptr<int32_t>(), table->data_ptr<int32_t>() + table->numel());
  }
  if (kept.plan == nullptr || kept.sizes != sizes || kept.layout != layout)
    kept = {layout, sizes, std::make_shared<const Plan>(segments, chain, groups, heads, window)};
  return kept.plan;
}

SharedKeys Plan::borrowed_keys(int64_t t, int64_t parts) const {
  const int64_t begin = share(t, parts), end = share(t + 1, parts);
  if (begin == 0 || begin >= end || tasks[begin - 1].head != tasks[begin].head) return {};
  int64_t low = padded_keys, high = 0;
  for (int64_t i = begin; i < end && tasks[i].head == tasks[begin].head; ++i)
    for (int64_t l = tasks[i].first_link; l < tasks[i].last_link; ++l) {
      if (links[l].first == links[l].last) continue;
      const KeyBlock& last = blocks[links[l].last - 1];
      low = std::min(low, blocks[links[l].first].offset);
      high = std::max(high, last.offset + last.padded);
    }
  return {tasks[begin].head, std::min(low, high), std::max<int64_t>(0, high - low)};
}

}  // namespace peftdyno
