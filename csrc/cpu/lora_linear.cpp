// Operators of kernels/lora_linear.py: in one parallel region the factors are packed, the skinny products made, and then
// the large one, which the low-rank terms join where it is ours.
#include "lora_call.h"

namespace peftdyno {
namespace {

// Every thread's scratch [threads, bytes].
Tensor thread_scratch(const LoraShape& shape, const std::optional<OwnProduct>& own, const Tensor& like) {
  const auto sizes = own ? shape.scratch(own->threads(), own->scratch_bytes()) : shape.scratch(0, 0);
  return at::empty(sizes, like.options().dtype(at::kByte));
}

// The packed forms of A and of B of every term.
class Packing {
 public:
  explicit Packing(const LoraCall& call) : call_(call), phase_(2 * static_cast<int64_t>(call.terms.size())) {}

  void finish(void* scratch) {
    phase_.finish([&](int64_t i) { kernels().lora_pack(call_.lora, call_.terms[i / 2], i % 2 == 1, scratch); });
  }

 private:
  const LoraCall& call_;
  Phase phase_;
};

// A product of ours, if it is.
std::optional<OwnProduct> own(const Tensor& left, const Tensor& right, Tensor& out, const ProductOptions& options) {
  std::optional<OwnProduct> found;
  if (options.low_rank != nullptr) found.emplace(left, right, out, options);
  return found;
}

}  // namespace

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
  call.place_operands(DOWN | UP_TRANSPOSED, x);
  const LowRankTerms terms = call.up_terms();
  if (joined) options.low_rank = &terms;
  std::optional<OwnProduct> large = own(x, weight, y, options);
  const Tensor scratch = thread_scratch(call, large, x);
  Packing packing(call);
  Phase down(static_cast<int64_t>(call.tasks.size()));
  in_parallel(scratch.size(0), [&](int64_t thread) {
    void* mine = part_of(scratch, thread);
    packing.finish(mine);
    down.finish([&](int64_t i) { kernels().lora_forward(call.lora, call.tasks[i], mine); });
    if (large) large->work(mine);
  });
  return {y, u};
}

std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& u_any, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t, bool need_x) {
  const Tensor dy = with_unit_columns(dy_any), x = with_unit_columns(x_any), u = with_unit_columns(u_any);
  TORCH_CHECK(dy.scalar_type() == x.scalar_type() && u.scalar_type() == x.scalar_type(), "types of dy, x and u differ");
  Tensors da, db;
  for (const Tensor& factor : a) da.push_back(at::empty(factor.sizes(), factor.options()));
  for (const Tensor& factor : b) db.push_back(at::empty(factor.sizes(), factor.options()));
  Tensor dx = need_x ? at::empty({x.size(0), x.size(1)}, dy.options()) : at::empty({0}, dy.options());
  const bool joined = need_x && own_product(is_bf16(dy), dy.size(0), dy.size(1));
  {
    LoraCall call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
    Lora& lora = call.lora;
    lora.u = rows_of(u);
    lora.dy = rows_of(dy);
    if (need_x && !joined) lora.dx = rows_of(dx);
    call.place_operands(need_x ? UP | DOWN_ROWS : UP, x);
    call.place_gradients(joined && lora.dropped, x);
    for (int64_t t = 0; t < static_cast<int64_t>(call.terms.size()); ++t) {
      const int64_t m = t / lora.num_runs, j = t % lora.num_runs;
      call.terms[t].da = da[m].data_ptr<float>() + j * da[m].stride(0);
      call.terms[t].db = db[m].data_ptr<float>() + j * db[m].stride(0);
    }
    const LowRankTerms terms = call.down_terms();
    std::optional<OwnProduct> large = own(dy, weight, dx, {.low_rank = joined ? &terms : nullptr});
    const Tensor scratch = thread_scratch(call, large, x);
    const std::vector<LoraStrip> strips = call.strips();
    Packing packing(call);
    Phase outputs(static_cast<int64_t>(call.tasks.size())), factors(static_cast<int64_t>(strips.size()));
    in_parallel(scratch.size(0), [&](int64_t thread) {
      void* mine = part_of(scratch, thread);
      packing.finish(mine);
      outputs.finish([&](int64_t i) { kernels().lora_output_gradients(lora, call.tasks[i], mine); });
      factors.work([&](int64_t i) { kernels().lora_strip(lora, strips[i], mine); });
      if (!large) return;
      if (lora.dropped) factors.wait();  // their masks
      large->work(mine);
    });
  }
  if (need_x && !joined) product(dy, weight, dx, {.accumulate = true});
  return {dx, da, db};
}

}  // namespace peftdyno
