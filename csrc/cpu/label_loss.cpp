// Operator of kernels/label_loss.py: the logits of one chunk of rows exist at a time.
#include "operators.h"
#include "product.h"

namespace peftdyno {
namespace {

// The head is read and packed once for so many rows.
constexpr int64_t CHUNK_ROWS = 512;

}  // namespace

int64_t label_loss_chunk() {
  return CHUNK_ROWS;
}

// Rows a multiple of a kibibyte apart fall on the same few lines of the first-level cache when their gradient is
// multiplied with the head.
int64_t label_loss_stride(int64_t vocabulary, int64_t element_size) {
  return vocabulary * element_size % 1024 == 0 ? vocabulary + 64 / element_size : vocabulary;
}

std::tuple<Tensor, Tensor> label_loss(const Tensor& x_any, const Tensor& head, const Tensor& targets_any,
                                      double softcap, bool need_gradient) {
  const Tensor x = with_unit_columns(x_any), targets = targets_any.to(at::kLong).contiguous();
  const int64_t n = x.size(0), vocabulary = head.size(0);
  TORCH_CHECK(targets.size(0) == n, "a target for each row");
  for (int64_t i = 0; i < n; ++i) {
    const int64_t target = targets.data_ptr<int64_t>()[i];
    TORCH_CHECK(target >= 0 && target < vocabulary, "target ", target, " is outside a vocabulary of ", vocabulary);
  }
  Tensor loss = empty_float({n}, x);
  Tensor gradient = need_gradient ? at::empty({n, x.size(1)}, x.options()) : at::empty({0}, x.options());
  const int64_t stride = label_loss_stride(vocabulary, x.element_size());
  const Tensor buffer = empty_with_spare(std::min(n, CHUNK_ROWS), vocabulary, stride - vocabulary, x);
  for (int64_t start = 0; start < n; start += CHUNK_ROWS) {
    const int64_t rows = std::min(CHUNK_ROWS, n - start);
    Tensor logits = buffer.narrow(0, 0, rows);
    product(x.narrow(0, start, rows), head, logits, {.transposed = true});
    LabelLoss task{is_bf16(x), need_gradient, vocabulary, rows_of(logits), targets.data_ptr<int64_t>() + start,
                   loss.data_ptr<float>() + start, static_cast<float>(softcap)};
    for_rows(rows, vocabulary, [&](int64_t begin, int64_t end) { kernels().label_loss(task, begin, end); });
    if (need_gradient) {
      Tensor target = gradient.narrow(0, start, rows);
      product(logits, head, target, {});
    }
  }
  return {loss, gradient};
}

}  // namespace peftdyno
