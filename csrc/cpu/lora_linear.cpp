// Operators of kernels/lora_linear.py: the large products by the library, the skinny ones by kernels of our own.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "lora_call.h"
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

// The rows of x with `columns` more than it shows.
Tensor widened(const Tensor& x, int64_t columns) {
  return x.as_strided({x.size(0), x.size(1) + columns}, x.strides());
}

// Columns in memory to the right of each row that nothing else can see: the storage is this tensor's alone.
int64_t room_beside(const Tensor& x) {
  if (x.size(0) == 0 || x.stride(1) != 1 || x.storage().use_count() != 1) return 0;
  const int64_t room = x.stride(0) - x.size(1), end = x.storage_offset() + x.size(0) * x.stride(0);
  return end * x.element_size() <= static_cast<int64_t>(x.storage().nbytes()) ? room : 0;
}

// dx = [dy, du] [W; A]
Tensor product_with_border(Lora& lora, const Tensor& wide_dy, const Tensor& weight, Tensor& dx) {
  const Tensor wide = weight.as_strided({weight.size(0) + lora.border_width, weight.size(1)}, weight.strides());
  lora.weight_below = rows_of(wide.narrow(0, weight.size(0), lora.border_width));
  for_rows(lora.border_width, weight.size(1), [&](int64_t begin, int64_t end) { kernels().lora_below(lora, begin, end); });
  return at::mm_out(dx, wide_dy, wide);
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_any, const Tensor& weight, const OptionalTensor& bias,
                                       TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                                       IntArrayRef run_offsets, double dropout, const OptionalTensor& streams,
                                       const OptionalTensor& keys, int64_t x_spare, int64_t border, int64_t spare) {
  const Tensor x = with_unit_columns(x_any);
  LoraCall call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Lora& lora = call.lora;
  Tensor u = at::empty({x.size(0), call.u_width}, x.options());
  lora.u = rows_of(u);
  const int64_t room = x.is_same(x_any) ? std::min(x_spare, border) : 0;
  const bool bordered = call.worth_a_border(room);
  auto run = [&] {
    call.for_shares(x, [&](int64_t, int64_t begin, int64_t end, void* scratch) {
      kernels().lora_forward(lora, begin, end, scratch);
    });
  };
  if (!bordered) {
    Tensor y = linear(x, weight, bias, spare);
    call.pack(DOWN | UP_TRANSPOSED, x);
    lora.y = rows_of(y);
    run();
    return {y, u};
  }
  lora.border_width = call.border_width(room);
  const Tensor wide_x = widened(x, lora.border_width), wide_weight = widened(weight, lora.border_width);
  lora.x_border = rows_of(wide_x.narrow(1, x.size(1), lora.border_width));
  lora.weight_border = rows_of(wide_weight.narrow(1, x.size(1), lora.border_width));
  call.pack(DOWN, x);
  for_rows(weight.size(0), 128, [&](int64_t begin, int64_t end) { kernels().lora_border(lora, begin, end); });
  run();
  return {linear(wide_x, wide_weight, bias, spare), u};
}

std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& u_any, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t border, bool need_x) {
  const Tensor dy = with_unit_columns(dy_any), x = with_unit_columns(x_any), u = with_unit_columns(u_any);
  TORCH_CHECK(dy.scalar_type() == x.scalar_type() && u.scalar_type() == x.scalar_type(), "types of dy, x and u differ");
  LoraCall call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Lora& lora = call.lora;
  lora.u = rows_of(u);
  lora.dy = rows_of(dy);
  lora.dy_width = dy.size(1);
  Tensor dx = at::empty({need_x ? x.size(0) : 0, x.size(1)}, dy.options()), wide_dy;
  const bool bordered = need_x && !lora.dropped && call.worth_a_border(border);
  if (bordered) {
    lora.border_width = call.border_width(border);
    wide_dy = room_beside(dy) >= lora.border_width ? widened(dy, lora.border_width)
                                                   : empty_with_spare(dy.size(0), dy.size(1) + lora.border_width, 0, dy);
    if (wide_dy.data_ptr() != dy.data_ptr()) lora.dy_copy = rows_of(wide_dy);
    lora.dy_border = rows_of(wide_dy.narrow(1, dy.size(1), lora.border_width));
  } else if (need_x) {
    lora.dx = rows_of(dx);
  }
  call.pack(need_x && !bordered ? UP | DOWN_ROWS : UP, x);
  const Tensor sums = at::zeros({call.threads(), call.gradient_size}, x.options().dtype(at::kFloat));
  call.for_shares(x, [&](int64_t thread, int64_t begin, int64_t end, void* scratch) {
    kernels().lora_backward(lora, begin, end, sums.data_ptr<float>() + thread * call.gradient_size, scratch);
  });
  if (bordered)
    dx = product_with_border(lora, wide_dy, weight, dx);
  else if (need_x)
    at::addmm_out(dx, dx, dy, weight);
  const LoraSums parts{sums.data_ptr<float>(), call.gradient_size, call.threads()};
  Tensors da, db;
  for (const Tensor& factor : a) da.push_back(at::empty(factor.sizes(), factor.options()));
  for (const Tensor& factor : b) db.push_back(at::empty(factor.sizes(), factor.options()));
  at::parallel_for(0, static_cast<int64_t>(call.terms.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m = t / lora.num_runs, j = t % lora.num_runs;
      kernels().lora_finish(lora, parts, call.terms[t], da[m].data_ptr<float>() + j * da[m].stride(0),
                            db[m].data_ptr<float>() + j * db[m].stride(0));
    }
  });
  return {need_x ? dx : at::empty({0}, dy.options()), da, db};
}

}  // namespace peftdyno
