// Operators of kernels/bank_affine.py, and the row scaling of kernels/label_loss.py.
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

void affine(Tensor& y, const Tensor& values_any, int64_t column, IntArrayRef run_offsets, bool multiply) {
  const Tensor values = values_any.contiguous();
  const int64_t width = values.size(1);
  TORCH_CHECK(y.stride(1) == 1 || y.size(1) == 1, "rows of y must be contiguous");
  Tensor piece = y.narrow(1, column, width);
  BankAffine task{is_bf16(y), multiply, width, rows_of(piece),
                  vectors_of_runs(values, width, run_offsets, y.size(0))};
  for_rows(y.size(0), width, [&](int64_t begin, int64_t end) { kernels().bank_affine(task, begin, end); });
}

}  // namespace

void bank_scale_(Tensor& y, const Tensor& scale, int64_t column, IntArrayRef run_offsets) {
  affine(y, scale, column, run_offsets, true);
}

void bank_shift_(Tensor& y, const Tensor& shift, int64_t column, IntArrayRef run_offsets) {
  affine(y, shift, column, run_offsets, false);
}

Tensor bank_column_sums(const Tensor& dy, const OptionalTensor& before_any, int64_t column, int64_t width,
                        IntArrayRef run_offsets) {
  const Tensor piece = with_unit_columns(dy.narrow(1, column, width));
  const int64_t num_runs = static_cast<int64_t>(run_offsets.size()) - 1;
  RowSums sums({num_runs, width}, dy);
  ColumnSums task{is_bf16(dy), width, rows_of(piece), {}, run_offsets.data(), num_runs, nullptr};
  Tensor before;
  if (before_any.has_value()) {
    before = with_unit_columns(before_any->to(dy.scalar_type()));
    task.before = rows_of(before);
  }
  sums.over_rows(dy.size(0), width, [&](int64_t begin, int64_t end, float* part) {
    ColumnSums mine = task;
    mine.sums = part;
    kernels().column_sums(mine, begin, end);
  });
  return sums.total();
}

Tensor scale_rows(const Tensor& x_any, const Tensor& factors_any) {
  const Tensor x = with_unit_columns(x_any), factors = factors_any.to(at::kFloat).contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  ScaleRows task{is_bf16(x), x.size(1), rows_of(x), rows_of(y), factors.data_ptr<float>()};
  for_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) { kernels().scale_rows(task, begin, end); });
  return y;
}

}  // namespace peftdyno
