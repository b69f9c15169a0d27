// Operators of kernels/linear.py: one large product each.
#include "operators.h"
#include "product.h"

namespace peftdyno {

Tensor linear(const Tensor& x_any, const Tensor& weight, const OptionalTensor& bias, int64_t spare) {
  const Tensor x = with_unit_columns(x_any);
  Tensor y = empty_with_spare(x.size(0), weight.size(0), spare, x);
  product(x, weight, y, {.transposed = true, .bias = bias.has_value() ? &*bias : nullptr});
  return y;
}

Tensor linear_backward(const Tensor& dy_any, const Tensor& weight) {
  const Tensor dy = with_unit_columns(dy_any);
  Tensor dx = at::empty({dy.size(0), weight.size(1)}, dy.options());
  product(dy, weight, dx, {});
  return dx;
}

}  // namespace peftdyno
