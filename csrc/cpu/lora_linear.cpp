// Operators of kernels/lora_linear.py.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

// The part of one call that belongs to module m and run j.
struct Block {
  int64_t module, run, token, tokens, row, rows, column, rank;
  double scale;
};

struct Call {
  TensorList a, b;
  at::ArrayRef<double> scaling;
  IntArrayRef rows, run_offsets;
  double dropout;
  const OptionalTensor &streams, &keys;

  std::vector<Block> blocks() const {
    const int64_t runs = static_cast<int64_t>(run_offsets.size()) - 1;
    std::vector<Block> result;
    int64_t column = 0;
    for (int64_t m = 0; m < static_cast<int64_t>(a.size()); ++m) {
      const int64_t rank = a[m].size(1);
      for (int64_t j = 0; j < runs; ++j)
        result.push_back({m, j, run_offsets[j], run_offsets[j + 1] - run_offsets[j], rows[2 * m],
                          rows[2 * m + 1] - rows[2 * m], column, rank, scaling[m * runs + j]});
      column += rank;
    }
    return result;
  }

  // target = x * mask, or target += x * mask, for the tokens of one block.
  void drop(const Block& block, const Tensor& x, Tensor& target, bool add) const {
    TORCH_CHECK(streams.has_value() && keys.has_value(), "dropout needs streams and keys");
    const int64_t threshold = std::llrint(dropout * 65536);
    const Tensor token_streams = streams->contiguous();
    const int64_t key = keys->contiguous().data_ptr<int64_t>()[block.module * keys->size(1) + block.run];
    const Dropout d{static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - threshold / 65536.0)),
                    static_cast<uint64_t>(key), token_streams.data_ptr<int64_t>() + block.token};
    const DropRows task{is_bf16(x), add, x.size(1), rows_of(x), rows_of(target), d};
    for_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) { kernels().drop_rows(task, begin, end); });
  }

  Tensor dropped(const Block& block, const Tensor& x) const {
    const Tensor piece = x.narrow(0, block.token, block.tokens);
    if (dropout == 0.0) return piece;
    Tensor result = at::empty(piece.sizes(), x.options());
    drop(block, piece, result, false);
    return result;
  }

  Tensor down(const Block& block, const Tensor& like) const { return a[block.module][block.run].to(like.scalar_type()); }
  Tensor up(const Block& block, const Tensor& like) const {
    return b[block.module][block.run].mul(block.scale).to(like.scalar_type());
  }
};

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_any, const Tensor& weight, const OptionalTensor& bias,
                                       TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                                       IntArrayRef run_offsets, double dropout, const OptionalTensor& streams,
                                       const OptionalTensor& keys, int64_t x_spare, int64_t border, int64_t spare) {
  const Tensor x = with_unit_columns(x_any);
  const Call call{a, b, scaling, rows, run_offsets, dropout, streams, keys};
  int64_t columns = 0;
  for (const Tensor& factor : a) columns += factor.size(1);
  Tensor y = linear(x, weight, bias, spare), u = at::empty({x.size(0), columns}, x.options());
  for (const Block& block : call.blocks()) {
    Tensor low = u.narrow(0, block.token, block.tokens).narrow(1, block.column, block.rank);
    at::mm_out(low, call.dropped(block, x), call.down(block, x).t());
    Tensor piece = y.narrow(0, block.token, block.tokens).narrow(1, block.row, block.rows);
    at::addmm_out(piece, piece, low, call.up(block, x).t());
  }
  return {y, u};
}

std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& u, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t border, bool need_x) {
  const Tensor dy = with_unit_columns(dy_any), x = with_unit_columns(x_any);
  const Call call{a, b, scaling, rows, run_offsets, dropout, streams, keys};
  Tensor dx = need_x ? linear_backward(dy, weight) : at::empty({0}, dy.options());
  Tensors da, db;
  for (const Tensor& factor : a) da.push_back(at::empty(factor.sizes(), factor.options()));
  for (const Tensor& factor : b) db.push_back(at::empty(factor.sizes(), factor.options()));
  for (const Block& block : call.blocks()) {
    const Tensor grad = dy.narrow(0, block.token, block.tokens).narrow(1, block.row, block.rows);
    const Tensor du = at::mm(grad, call.up(block, dy));
    da[block.module][block.run].copy_(at::mm(du.t(), call.dropped(block, x)));
    const Tensor low = u.narrow(0, block.token, block.tokens).narrow(1, block.column, block.rank);
    db[block.module][block.run].copy_(at::mm(grad.t(), low)).mul_(block.scale);
    if (!need_x) continue;
    Tensor target = dx.narrow(0, block.token, block.tokens);
    if (dropout == 0.0)
      at::addmm_out(target, target, du, call.down(block, dy));
    else
      call.drop(block, at::mm(du, call.down(block, dy)), target, true);
  }
  return {dx, da, db};
}

}  // namespace peftdyno
