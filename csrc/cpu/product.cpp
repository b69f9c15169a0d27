// How a large product is divided among threads and blocks; the kernel is product_kernel.h.
#include "product.h"

#include "packed.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <array>

namespace peftdyno {
namespace {

constexpr int64_t WHOLE_DEPTH = 1536, DEPTH_BLOCK = 768, DEEP_BLOCK = 384;  // the last where there are many blocks
constexpr int64_t LEFT_BYTES = 768 << 10;   // of the left factor that pass by while panels in parts stay in cache
constexpr int64_t GROUP_BYTES = 320 << 10;  // of panels packed together
constexpr int64_t MANY_ROWS = 1024, FEW_ROWS = 256;  // of a left factor that stays in cache, whole and in parts
constexpr int64_t SMALL_GROUP = 3, LARGE_GROUP = 8;  // panels at least; the second where rows come from memory anew

// Units of work, several a thread, so that one that its processor slows down can take fewer.
struct Blocks {
  int64_t depth, rows, group, row_shares = 1, threads;

  Blocks(int64_t num_rows, int64_t full_depth, int64_t panels) {
    const int64_t most = full_depth > 4 * DEPTH_BLOCK ? DEEP_BLOCK : DEPTH_BLOCK;
    const int64_t row_blocks = ratio_up(num_rows, PRODUCT_ROWS);
    const bool whole = full_depth <= WHOLE_DEPTH, many = num_rows > MANY_ROWS;
    depth = whole ? full_depth : padded_to(ratio_up(full_depth, ratio_up(full_depth, most)), 32);
    rows = whole ? row_blocks * PRODUCT_ROWS
                 : std::max<int64_t>(PRODUCT_ROWS, LEFT_BYTES / (2 * depth) / PRODUCT_ROWS * PRODUCT_ROWS);
    const int64_t available = at::get_num_threads(), least = available == 1 ? 1 : 2 * available;
    const int64_t largest = std::max<int64_t>(2, (many ? 2 : 1) * GROUP_BYTES / (2 * PANEL * depth));
    const bool streamed = many || (!whole && num_rows > FEW_ROWS);
    const int64_t smallest = std::min(largest, streamed ? LARGE_GROUP : SMALL_GROUP);
    const int64_t wanted = std::min(streamed ? least : 2 * least, ratio_up(panels, smallest));
    group = ratio_up(panels, std::max(ratio_up(panels, largest), wanted));
    const int64_t groups = ratio_up(panels, group);
    if (groups < least) row_shares = std::max<int64_t>(1, std::min(ratio_up(least, groups), row_blocks / 4));
    threads = std::min(available, row_shares * groups);
  }

  // Of one thread; the pieces are 64 bytes apart.
  int64_t bytes(int64_t full_depth, int64_t rank, bool packed) const {
    const int64_t sums = depth < full_depth ? group * rows * PANEL : PRODUCT_ROWS * PANEL;
    const int64_t operands = 2 * depth * ((packed ? 0 : group * PANEL) + PRODUCT_ROWS);
    return padded_to(operands + 4 * sums + 2 * PRODUCT_ROWS * padded_to(rank, 32) + 256, 64);
  }
};

void add_panels(int64_t begin, int64_t end, int64_t module, std::vector<Panel>& panels) {
  for (int64_t column = begin; column < end; column += PANEL)
    panels.push_back({column, std::min(PANEL, end - column), module});
}

// Panels in the order of columns, cut where an adapted module begins or ends.
std::vector<Panel> panels_of(int64_t columns, const LoraCall* lora) {
  std::vector<std::array<int64_t, 3>> modules;
  for (int64_t m = 0; lora != nullptr && m < lora->lora.num_modules; ++m) {
    const LoraTerm& term = lora->terms[m * lora->lora.num_runs];
    modules.push_back({term.out_column, term.out_column + term.out_width, m});
  }
  std::sort(modules.begin(), modules.end());
  std::vector<Panel> panels;
  int64_t column = 0;
  for (const auto& [begin, end, module] : modules) {
    add_panels(column, begin, -1, panels);
    add_panels(begin, end, module, panels);
    column = end;
  }
  add_panels(column, columns, -1, panels);
  return panels;
}

void by_library(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options) {
  const Tensor factor = options.transposed ? right.t() : right;
  options.accumulate ? at::addmm_out(out, out, left, factor) : at::mm_out(out, left, factor);
  if (options.bias != nullptr) out.add_(*options.bias);
}

}  // namespace

bool own_product(bool bf16, int64_t rows, int64_t depth) {
  return bf16 && kernels().product != nullptr && rows > 0 && depth % 32 == 0;
}

int64_t product_bytes(int64_t rows, int64_t depth, int64_t columns, int64_t rank) {
  const Blocks blocks(rows, depth, ratio_up(columns, PANEL));
  return blocks.threads * blocks.bytes(depth, rank, false);
}

Tensor pack_whole(const Tensor& weight) {
  const int64_t depth = weight.size(1), columns = weight.size(0);
  if (!own_product(is_bf16(weight), 1, depth) || weight.stride(1) != 1) return {};
  const std::vector<Panel> panels = panels_of(columns, nullptr);
  Tensor packed = at::empty({static_cast<int64_t>(panels.size()) * PANEL, depth}, weight.options());
  Product p{};
  p.depth = depth;
  p.right = rows_of(weight);
  p.transposed = true;
  p.panels = panels.data();
  at::parallel_for(0, static_cast<int64_t>(panels.size()), 1, [&](int64_t begin, int64_t end) {
    kernels().pack_product(p, begin, end, packed.data_ptr());
  });
  return packed;
}

void product(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options) {
  const int64_t rows = left.size(0), depth = left.size(1), columns = out.size(1);
  const void* packed = is_bf16(left) && options.transposed ? packed_panels(right) : nullptr;
  if (!own_product(is_bf16(left), rows, depth)) return by_library(left, right, out, options);
  TORCH_CHECK(left.stride(1) == 1 && right.stride(1) == 1 && out.stride(1) == 1, "rows of a product are contiguous");
  const std::vector<Panel> panels = panels_of(columns, options.lora);
  for (const Panel& panel : panels)
    if (panel.column % PANEL != 0) packed = nullptr;  // modules cut the panels elsewhere
  const int64_t count = static_cast<int64_t>(panels.size()), rank = options.lora == nullptr ? 0 : options.lora->largest_rank;
  const Blocks blocks(rows, depth, ratio_up(columns, PANEL));
  const int64_t whole[2] = {0, rows};
  const Product p{rows, depth, rows_of(left), rows_of(right), rows_of(out), options.transposed, options.accumulate,
                  options.bias == nullptr ? nullptr : options.bias->data_ptr(),
                  options.lora == nullptr ? nullptr : &options.lora->lora, packed, panels.data(), count, blocks.depth,
                  blocks.rows, blocks.group, blocks.row_shares,
                  options.lora == nullptr ? whole : options.lora->run_offsets.data(),
                  options.lora == nullptr ? 1 : options.lora->lora.num_runs};
  const Tensor scratch =
      at::empty({blocks.threads, blocks.bytes(depth, rank, packed != nullptr)}, left.options().dtype(at::kByte));
  int64_t next_unit = 0;
  at::parallel_for(0, blocks.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().product(p, &next_unit, scratch.data_ptr<uint8_t>() + i * scratch.size(1));
  });
}

}  // namespace peftdyno
