// Operators of kernels/linear.py: library products on strided rows.
#include <ATen/ops/mm.h>

#include "operators.h"
#include "tensors.h"

namespace peftdyno {

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t spare) {
  Tensor y = empty_with_spare(x.size(0), weight.size(0), spare, x);
  at::mm_out(y, x, weight.t());
  if (bias.has_value()) y.add_(*bias);
  return y;
}

Tensor linear_backward(const Tensor& dy, const Tensor& weight) {
  return at::mm(dy, weight);
}

}  // namespace peftdyno
