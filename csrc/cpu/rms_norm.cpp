// Operators of kernels/rms_norm.py.
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

// weight + offset in fp32, [R, D].
Tensor shifted(const Tensor& weight, double offset) {
  const Tensor source = weight.contiguous();
  if (!is_bf16(source) && offset == 0.0) return source;
  Tensor w = empty_float(source.sizes(), source);
  float* to = w.data_ptr<float>();
  const int64_t n = source.numel();
  const float more = static_cast<float>(offset);
  if (is_bf16(source))
    std::transform(source.data_ptr<at::BFloat16>(), source.data_ptr<at::BFloat16>() + n, to,
                   [more](at::BFloat16 x) { return static_cast<float>(x) + more; });
  else
    std::transform(source.data_ptr<float>(), source.data_ptr<float>() + n, to, [more](float x) { return x + more; });
  return w;
}

RunVectors vectors(const Tensor& weight, IntArrayRef run_offsets, const Tensor& x) {
  if (weight.dim() == 2) return vectors_of_runs(weight, x.size(1), run_offsets, x.size(0));
  TORCH_CHECK(weight.numel() == x.size(1), "a weight of ", weight.sizes(), " for rows of ", x.size(1));
  return {weight.data_ptr<float>(), nullptr, 1};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x_any, const OptionalTensor& residual_any,
                                            const Tensor& weight, IntArrayRef run_offsets, double eps, double offset,
                                            int64_t spare) {
  const Tensor x = with_unit_columns(x_any), w = shifted(weight, offset);
  const int64_t n = x.size(0), width = x.size(1);
  Tensor y = empty_with_spare(n, width, spare, x), rstd = empty_float({n}, x), residual;
  Tensor h = at::empty({0}, x.options());
  NormForward task{is_bf16(x), width, rows_of(x), {}, rows_of(y), {}, vectors(w, run_offsets, x),
                   rstd.data_ptr<float>(), static_cast<float>(eps)};
  if (residual_any.has_value()) {
    residual = with_unit_columns(residual_any->to(x.scalar_type()));
    h = at::empty({n, width}, x.options());
    task.residual = rows_of(residual);
    task.h = rows_of(h);
  }
  for_rows(n, width, [&](int64_t begin, int64_t end) { kernels().norm_forward(task, begin, end); });
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_any, const OptionalTensor& dh_any, const Tensor& h_any,
                                             const Tensor& weight, const Tensor& rstd, IntArrayRef run_offsets,
                                             double offset, bool need_weight) {
  const Tensor dy = with_unit_columns(dy_any), h = with_unit_columns(h_any), w = shifted(weight, offset);
  const Tensor rstd_row = rstd.contiguous();
  const int64_t n = h.size(0), width = h.size(1);
  Tensor dx = at::empty({n, width}, h.options()), dh;
  NormBackward task{is_bf16(h), width, rows_of(dy), {}, rows_of(h), rows_of(dx), vectors(w, run_offsets, h),
                    rstd_row.data_ptr<float>(), nullptr};
  TORCH_CHECK(dy.scalar_type() == h.scalar_type(), "dy and h differ in type");
  if (dh_any.has_value()) {
    dh = with_unit_columns(dh_any->to(h.scalar_type()));
    task.dh = rows_of(dh);
  }
  if (!need_weight) {
    for_rows(n, width, [&](int64_t begin, int64_t end) { kernels().norm_backward(task, begin, end); });
    return {dx, empty_float({0}, h)};
  }
  RowSums sums(weight.sizes(), h);
  sums.over_rows(n, width, [&](int64_t begin, int64_t end, float* dweight) {
    NormBackward mine = task;
    mine.dweight = dweight;
    kernels().norm_backward(mine, begin, end);
  });
  return {dx, sums.total()};
}

}  // namespace peftdyno
