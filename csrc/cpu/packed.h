// Frozen weights kept a second time as panels, so that a product need not pack them.
#pragma once

#include <ATen/core/Tensor.h>

namespace peftdyno {

// The panels of W for x W^T, or with `backward` for dy W; undefined where none are kept or the weight has changed since.
at::Tensor packed_panels(const at::Tensor& weight, bool backward);

}  // namespace peftdyno
