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
constexpr int64_t LEAST_ROWS = 128;         // for which panels are packed anew
constexpr int64_t MANY_ROWS = 1024, FEW_ROWS = 256;  // of a left factor that stays in cache, whole and in parts
constexpr int64_t SMALL_GROUP = 3, LARGE_GROUP = 8;  // panels at least; the second where rows come from memory anew

// Units of work, several a thread, so that one that its processor slows down can take fewer.
struct Blocks {
  const int64_t element = kernels().operand_bytes(true);  // of factors as they are packed
  int64_t depth, rows, group, row_shares = 1, threads;

  Blocks(int64_t num_rows, int64_t full_depth, int64_t panels) {
    const int64_t most = full_depth > 4 * DEPTH_BLOCK ? DEEP_BLOCK : DEPTH_BLOCK;
    const int64_t row_blocks = ratio_up(num_rows, PRODUCT_ROWS);
    const bool whole = full_depth <= WHOLE_DEPTH, many = num_rows > MANY_ROWS;
    depth = whole ? full_depth : padded_to(ratio_up(full_depth, ratio_up(full_depth, most)), 32);
    rows = std::min(row_blocks, LEFT_BYTES / (element * depth * PRODUCT_ROWS)) * PRODUCT_ROWS;
    const int64_t available = at::get_num_threads(), least = available == 1 ? 1 : 2 * available;
    const int64_t largest = std::max<int64_t>(2, (many ? 2 : 1) * GROUP_BYTES / (element * PANEL * depth));
    const bool streamed = many || (!whole && num_rows > FEW_ROWS);
    const int64_t smallest = std::min(largest, streamed ? LARGE_GROUP : SMALL_GROUP);
    const int64_t wanted = std::min(streamed ? least : 2 * least, ratio_up(panels, smallest));
    group = ratio_up(panels, std::max(ratio_up(panels, largest), wanted));
    const int64_t groups = ratio_up(panels, group);
    const int64_t most_shares = std::max<int64_t>(1, row_blocks * PRODUCT_ROWS / LEAST_ROWS);
    if (groups < least) row_shares = std::min(ratio_up(least, groups), most_shares);
    threads = std::min(available, row_shares * groups);
  }

  // Of one thread; the pieces are 64 bytes apart.
  int64_t bytes(const ProductShape& shape, bool packed) const {
    const int64_t sums = (depth < shape.depth ? group : 1) * rows * PANEL + PRODUCT_ROWS * PANEL;
    const int64_t left_rows = element == 2 ? PRODUCT_ROWS : rows;  // copied: the last block, or all to be widened
    const int64_t operands = element * depth * ((packed ? 0 : group * PANEL) + left_rows);
    const int64_t low_rank = element * rows * shape.num_modules * shape.largest_rank;
    return padded_to(operands + 4 * sums + low_rank + 320, 64);
  }
};

ProductShape shape_of(const Tensor& left, const Tensor& out, const LowRankTerms* low_rank) {
  ProductShape shape{left.size(0), left.size(1), out.size(1)};
  if (low_rank == nullptr) return shape;
  shape.num_modules = low_rank->num_modules();
  for (const LowRankTerm& term : low_rank->terms) shape.largest_rank = std::max(shape.largest_rank, term.padded_rank);
  return shape;
}

void add_panels(int64_t begin, int64_t end, int64_t first, int64_t last, std::vector<Panel>& panels) {
  for (int64_t column = begin; column < end; column += PANEL)
    panels.push_back({column, std::min(PANEL, end - column), first, last});
}

// Panels in the order of columns, cut where an adapted module begins or ends.
std::vector<Panel> panels_of(int64_t columns, const LowRankTerms* low_rank) {
  std::vector<Panel> panels;
  const int64_t num_modules = low_rank == nullptr ? 0 : low_rank->num_modules();
  if (num_modules == 0 || low_rank->everywhere) {
    add_panels(0, columns, 0, num_modules, panels);
    return panels;
  }
  std::vector<std::array<int64_t, 3>> modules;
  for (int64_t m = 0; m < num_modules; ++m) {
    const LowRankTerm& term = low_rank->terms[m * low_rank->num_runs()];
    modules.push_back({term.column, term.column + term.width, m});
  }
  std::sort(modules.begin(), modules.end());
  int64_t column = 0;
  for (const auto& [begin, end, module] : modules) {
    add_panels(column, begin, 0, 0, panels);
    add_panels(begin, end, module, module + 1, panels);
    column = end;
  }
  add_panels(column, columns, 0, 0, panels);
  return panels;
}

// The panels of a weight, where they are kept and this product reads them as they lie.
Tensor kept_panels(const Tensor& right, bool backward, const std::vector<Panel>& panels) {
  if (kernels().pack_product == nullptr) return {};  // kept for another instruction set
  for (const Panel& panel : panels)
    if (panel.column % PANEL != 0) return {};  // modules cut the panels elsewhere
  return packed_panels(right, backward);
}

void check_factors(const Tensor& left, const Tensor& right, const Tensor& out, const ProductOptions& options) {
  const bool fits = right.size(options.transposed ? 1 : 0) == left.size(1);
  TORCH_CHECK(fits && right.size(options.transposed ? 0 : 1) == out.size(1) && out.size(0) == left.size(0),
              "factors of ", left.sizes(), " and ", right.sizes(), " do not make ", out.sizes());
  const auto type = left.scalar_type();
  TORCH_CHECK(right.scalar_type() == type && out.scalar_type() == type, "a product of ", type, " by ", right.scalar_type());
  if (options.bias == nullptr) return;
  TORCH_CHECK(options.bias->scalar_type() == type && options.bias->numel() == out.size(1) && options.bias->is_contiguous(),
              "a bias of ", options.bias->sizes(), " ", options.bias->scalar_type(), " for ", out.sizes(), " ", type);
}

void by_library(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options) {
  const Tensor factor = options.transposed ? right.t() : right;
  options.accumulate ? at::addmm_out(out, out, left, factor) : at::mm_out(out, left, factor);
  if (options.bias != nullptr) out.add_(*options.bias);
}

}  // namespace

bool own_product(bool bf16, int64_t rows, int64_t depth) {
  if (!bf16 || kernels().product == nullptr || depth == 0 || depth % 32 != 0) return false;
  // The library reads a weight for one row as it is; widening it first takes longer.
  return rows > (kernels().pack_product == nullptr ? 1 : 0);
}

bool has_panels(bool bf16, int64_t depth) {
  return kernels().pack_product != nullptr && own_product(bf16, 1, depth);
}

std::tuple<int64_t, int64_t> product_bytes(const ProductShape& shape) {
  const Blocks blocks(shape.rows, shape.depth, ratio_up(shape.columns, PANEL));
  return {blocks.threads, blocks.bytes(shape, false)};
}

Tensor pack_whole(const Tensor& weight, bool backward) {
  const int64_t depth = weight.size(backward ? 0 : 1), columns = weight.size(backward ? 1 : 0);
  if (!has_panels(is_bf16(weight), depth) || weight.stride(1) != 1) return {};
  const std::vector<Panel> panels = panels_of(columns, nullptr);
  Tensor packed = at::empty({static_cast<int64_t>(panels.size()) * PANEL, depth}, weight.options());
  Product p{};
  p.depth = depth;
  p.right = rows_of(weight);
  p.transposed = !backward;
  p.panels = panels.data();
  at::parallel_for(0, static_cast<int64_t>(panels.size()), 1, [&](int64_t begin, int64_t end) {
    kernels().pack_product(p, begin, end, packed.data_ptr());
  });
  return packed;
}

OwnProduct::OwnProduct(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options)
    : panels_(panels_of(out.size(1), options.low_rank)),
      packed_(kept_panels(right, !options.transposed, panels_)),
      run_offsets_{0, left.size(0)} {
  check_factors(left, right, out, options);
  TORCH_CHECK(left.stride(1) == 1 && right.stride(1) == 1 && out.stride(1) == 1, "rows of a product are contiguous");
  const ProductShape shape = shape_of(left, out, options.low_rank);
  const Blocks blocks(shape.rows, shape.depth, ratio_up(shape.columns, PANEL));
  const void* packed = packed_.defined() ? packed_.data_ptr() : nullptr;
  if (options.low_rank != nullptr) run_offsets_ = options.low_rank->run_offsets;
  product_ = {shape.rows, shape.depth, rows_of(left), rows_of(right), rows_of(out), options.transposed,
              options.accumulate, options.bias == nullptr ? nullptr : options.bias->data_ptr(),
              options.low_rank == nullptr ? nullptr : options.low_rank->terms.data(), shape.largest_rank, packed,
              panels_.data(), static_cast<int64_t>(panels_.size()), blocks.depth, blocks.rows, blocks.group,
              blocks.row_shares, run_offsets_.data(), static_cast<int64_t>(run_offsets_.size()) - 1};
  threads_ = blocks.threads;
  scratch_bytes_ = blocks.bytes(shape, packed != nullptr);
}

void product(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options) {
  if (!own_product(is_bf16(left), left.size(0), left.size(1))) return by_library(left, right, out, options);
  OwnProduct own(left, right, out, options);
  const Tensor scratch = at::empty({own.threads(), own.scratch_bytes()}, left.options().dtype(at::kByte));
  in_parallel(own.threads(), [&](int64_t thread) {
    own.work(part_of(scratch, thread));
  });
}

}  // namespace peftdyno
