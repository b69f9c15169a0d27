// Operators of kernels/lora_linear.py: the skinny products by kernels of their own, then the large one.
#include "operators.h"
#include "product.h"

namespace peftdyno {

// Where the large product is ours, s u B^T joins it; otherwise it is added to what the library gave.
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_any, const Tensor& weight, const OptionalTensor& bias,
                                       TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                                       IntArrayRef run_offsets, double dropout, const OptionalTensor& streams,
                                       const OptionalTensor& keys, int64_t, int64_t, int64_t spare) {
  const Tensor x = with_unit_columns(x_any);
  LoraCall call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Tensor u = at::empty({x.size(0), call.u_width}, x.options());
  call.lora.u = rows_of(u);
  Tensor y = empty_with_spare(x.size(0), weight.size(0), spare, x);
  ProductOptions options{.transposed = true, .bias = bias.has_value() ? &*bias : nullptr};
  const bool joined = own_product(call.lora.bf16, x.size(0), x.size(1));
  if (!joined) {
    product(x, weight, y, options);
    call.lora.y = rows_of(y);
  }
  call.pack(DOWN | UP_TRANSPOSED, x);
  call.for_shares(x, [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels().lora_forward(call.lora, begin, end, scratch);
  });
  if (joined) {
    options.lora = &call;
    product(x, weight, y, options);
  }
  return {y, u};
}

// mask (du A) goes to dx first, and dy W is added to it.
std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& u_any, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t, bool need_x) {
  const Tensor dy = with_unit_columns(dy_any), x = with_unit_columns(x_any), u = with_unit_columns(u_any);
  TORCH_CHECK(dy.scalar_type() == x.scalar_type() && u.scalar_type() == x.scalar_type(), "types of dy, x and u differ");
  LoraCall call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Lora& lora = call.lora;
  lora.u = rows_of(u);
  lora.dy = rows_of(dy);
  Tensor dx = need_x ? at::empty({x.size(0), x.size(1)}, dy.options()) : at::empty({0}, dy.options());
  if (need_x) lora.dx = rows_of(dx);
  call.pack(need_x ? UP | DOWN_ROWS : UP, x);
  const Tensor sums = empty_float({call.threads(), call.gradient_size}, x);
  call.for_shares(x, [&](int64_t thread, int64_t begin, int64_t end, void* scratch) {
    float* mine = sums.data_ptr<float>() + thread * call.gradient_size;
    std::fill_n(mine, call.gradient_size, 0.0f);
    kernels().lora_backward(lora, begin, end, mine, scratch);
  });
  if (need_x) product(dy, weight, dx, {.accumulate = true});
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
  return {dx, da, db};
}

}  // namespace peftdyno
