// Operators of kernels/nf4.py.
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

constexpr int64_t NESTED_BLOCK = 256, DYNAMIC_CODES = 256;

void check_vector(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == type, name, " of a 4-bit weight must be contiguous ", type);
}

// What the codes of a nested block stand for. Stored, so that no compiler fuses the product with the sum after it.
void fill_products(const float* book, float factor, float* products) {
  for (int64_t i = 0; i < DYNAMIC_CODES; ++i) products[i] = book[i] * factor;
}

}  // namespace

Tensor nf4_dequantise(const Tensor& codes, const Tensor& absmax, const Tensor& codebook, int64_t rows, int64_t columns,
                      at::ScalarType dtype) {
  check_vector(codes, at::kByte, "codes");
  check_vector(absmax, at::kFloat, "absmax");
  check_vector(codebook, at::kFloat, "the codebook");
  const int64_t blocks = absmax.numel();
  TORCH_CHECK(codebook.numel() == 16 && blocks * NF4_BLOCK == rows * columns && 2 * codes.numel() == rows * columns,
              "codes and absmax do not fit a weight of ", rows, " x ", columns);
  Tensor out = at::empty({rows, columns}, codes.options().dtype(dtype));
  const Nf4Dequantise task{is_bf16(out), codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(),
                           codebook.data_ptr<float>(), out.data_ptr()};
  for_rows(blocks, NF4_BLOCK, [&](int64_t begin, int64_t end) { kernels().nf4_dequantise(task, begin, end); });
  return out;
}

Tensor nf4_absmax(const Tensor& codes, const Tensor& absmax, const Tensor& offsets, const Tensor& book,
                  IntArrayRef sizes) {
  check_vector(codes, at::kByte, "codes of absmax");
  for (const Tensor& t : {absmax, offsets, book}) check_vector(t, at::kFloat, "absmax");
  int64_t count = 0, groups = 0;
  for (const int64_t size : sizes) {
    count += size;
    groups += (size + NESTED_BLOCK - 1) / NESTED_BLOCK;
  }
  TORCH_CHECK(count == codes.numel() && groups == absmax.numel() && book.numel() == DYNAMIC_CODES &&
                  offsets.numel() == static_cast<int64_t>(sizes.size()),
              "the nested absmax of a 4-bit weight does not fit its modules");
  Tensor out = at::empty({count}, absmax.options());
  const uint8_t* code = codes.data_ptr<uint8_t>();
  const float* factor = absmax.data_ptr<float>();
  float *to = out.data_ptr<float>(), products[DYNAMIC_CODES];
  for (size_t m = 0; m < sizes.size(); ++m) {
    const float offset = offsets.data_ptr<float>()[m];
    for (int64_t left = sizes[m]; left > 0; left -= NESTED_BLOCK) {
      fill_products(book.data_ptr<float>(), *factor++, products);
      for (int64_t i = std::min(left, NESTED_BLOCK); i > 0; --i) *to++ = products[*code++] + offset;
    }
  }
  return out;
}

}  // namespace peftdyno
