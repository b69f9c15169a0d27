// Operators of kernels/glu.py.
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

Activation activation_named(c10::string_view name) {
  if (name == "silu") return Activation::silu;
  TORCH_CHECK(name == "gelu_tanh", "activation '", name, "' is not silu or gelu_tanh");
  return Activation::gelu_tanh;
}

}  // namespace

Tensor glu(const Tensor& gate_up_any, const OptionalTensor& scale, c10::string_view activation,
           IntArrayRef run_offsets, int64_t spare) {
  const Tensor gate_up = with_unit_columns(gate_up_any);
  const int64_t n = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor y = empty_with_spare(n, width, spare, gate_up), factors;
  GluForward task{is_bf16(gate_up), width, activation_named(activation), rows_of(gate_up), rows_of(y), {}};
  if (scale.has_value()) {
    factors = scale->contiguous();
    task.scale = vectors_of_runs(factors, width, run_offsets, n);
  }
  for_rows(n, 2 * width, [&](int64_t begin, int64_t end) { kernels().glu_forward(task, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy_any, const Tensor& gate_up_any, const OptionalTensor& scale,
                                        c10::string_view activation, IntArrayRef run_offsets, int64_t spare) {
  const Tensor gate_up = with_unit_columns(gate_up_any), dy = with_unit_columns(dy_any);
  const int64_t n = gate_up.size(0), width = gate_up.size(1) / 2;
  TORCH_CHECK(dy.scalar_type() == gate_up.scalar_type(), "dy and gate_up differ in type");
  Tensor d = empty_with_spare(n, 2 * width, spare, gate_up);
  GluBackward task{is_bf16(gate_up), width, activation_named(activation), rows_of(dy), rows_of(gate_up), rows_of(d),
                   {}, nullptr};
  if (!scale.has_value()) {
    for_rows(n, 4 * width, [&](int64_t begin, int64_t end) { kernels().glu_backward(task, begin, end); });
    return {d, empty_float({0}, d)};
  }
  const Tensor factors = scale->contiguous();
  task.scale = vectors_of_runs(factors, width, run_offsets, n);
  RowSums sums(scale->sizes(), d);
  sums.over_rows(n, 4 * width, [&](int64_t begin, int64_t end, float* dscale) {
    GluBackward mine = task;
    mine.dscale = dscale;
    kernels().glu_backward(mine, begin, end);
  });
  return {d, sums.total()};
}

}  // namespace peftdyno
