#include "packed.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "operators.h"
#include "product.h"

namespace peftdyno {
namespace {

// The weight is held, so that its address stays its own.
struct Kept {
  Tensor weight, forward, backward;  // the last undefined where products with dy are to pack it themselves
  int64_t version;
};

struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<const void*, Kept> kept;
};

Registry& registry() {
  static Registry* one = new Registry;  // outlives every thread
  return *one;
}

}  // namespace

Tensor packed_panels(const Tensor& weight, bool backward) {
  Registry& all = registry();
  const std::shared_lock lock(all.mutex);
  const auto found = all.kept.find(weight.data_ptr());
  if (found == all.kept.end()) return {};
  const Kept& kept = found->second;
  const bool same = kept.weight.sizes() == weight.sizes() && kept.weight.strides() == weight.strides() &&
                    kept.weight._version() == kept.version;
  if (!same) return {};
  return backward ? kept.backward : kept.forward;
}

int64_t packed_bytes(IntArrayRef shape, bool bf16, bool backward) {
  const auto bytes = [&](int64_t depth, int64_t columns) {
    return has_panels(bf16, depth) ? 2 * depth * padded_to(columns, PANEL) : 0;
  };
  return bytes(shape[1], shape[0]) + (backward ? bytes(shape[0], shape[1]) : 0);
}

int64_t keep_packed(const Tensor& weight, bool backward) {
  Kept kept{weight, pack_whole(weight, false), backward ? pack_whole(weight, true) : Tensor(), weight._version()};
  int64_t bytes = 0;
  for (const Tensor* panels : {&kept.forward, &kept.backward})
    if (panels->defined()) bytes += static_cast<int64_t>(panels->nbytes());
  if (bytes == 0) return 0;
  Registry& all = registry();
  const std::unique_lock lock(all.mutex);
  all.kept.insert_or_assign(weight.data_ptr(), std::move(kept));
  return bytes;
}

void forget_packed(const Tensor& weight) {
  Registry& all = registry();
  const std::unique_lock lock(all.mutex);
  all.kept.erase(weight.data_ptr());
}

}  // namespace peftdyno
