// Operator of kernels/rotary.py.
#include "operators.h"
#include "tensors.h"

namespace peftdyno {

void rotary_(Tensor& qkv, const Tensor& cos_any, const Tensor& sin_any, int64_t num_heads, bool inverse) {
  const Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  TORCH_CHECK(qkv.stride(1) == 1 || qkv.size(1) == 1, "rows of qkv must be contiguous");
  TORCH_CHECK(cos.size(0) == qkv.size(0) && num_heads * 2 * cos.size(1) <= qkv.size(1), "angles do not fit the rows");
  Rotary task{is_bf16(qkv), num_heads, cos.size(1), rows_of(qkv), cos.data_ptr<float>(), sin.data_ptr<float>(), inverse};
  for_rows(qkv.size(0), qkv.size(1), [&](int64_t begin, int64_t end) { kernels().rotary(task, begin, end); });
}

}  // namespace peftdyno
