// The operators, with the arguments and results of the schemas in kernels/*.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace peftdyno {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                            IntArrayRef run_offsets, double eps, double offset, int64_t spare);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                                             const Tensor& weight, const Tensor& rstd, IntArrayRef run_offsets,
                                             double offset, bool need_weight);
Tensor glu(const Tensor& gate_up, const OptionalTensor& scale, c10::string_view activation, IntArrayRef run_offsets,
           int64_t spare);
std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy, const Tensor& gate_up, const OptionalTensor& scale,
                                        c10::string_view activation, IntArrayRef run_offsets, int64_t spare);
void rotary_(Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads, bool inverse);
void bank_scale_(Tensor& y, const Tensor& scale, int64_t column, IntArrayRef run_offsets);
void bank_shift_(Tensor& y, const Tensor& shift, int64_t column, IntArrayRef run_offsets);
Tensor bank_column_sums(const Tensor& dy, const OptionalTensor& before, int64_t column, int64_t width,
                        IntArrayRef run_offsets);
Tensor scale_rows(const Tensor& x, const Tensor& factors);
void adamw_(Tensor& p, const Tensor& g, Tensor& m, Tensor& v, at::ArrayRef<double> rates, at::ArrayRef<double> clips,
            IntArrayRef steps, double beta1, double beta2, double eps, double decay);
std::tuple<Tensor, Tensor> label_loss(const Tensor& x, const Tensor& head, const Tensor& targets, double softcap,
                                      bool need_gradient);
Tensor nf4_dequantise(const Tensor& codes, const Tensor& absmax, const Tensor& codebook, int64_t rows, int64_t columns,
                      at::ScalarType dtype);
Tensor nf4_absmax(const Tensor& codes, const Tensor& absmax, const Tensor& offsets, const Tensor& book,
                  IntArrayRef sizes);
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t spare);
Tensor linear_backward(const Tensor& dy, const Tensor& weight);
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, TensorList a,
                                       TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                                       IntArrayRef run_offsets, double dropout, const OptionalTensor& streams,
                                       const OptionalTensor& keys, int64_t x_spare, int64_t border, int64_t spare);
std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& u, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t border, bool need_x);
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& prefix_k,
                                     const OptionalTensor& prefix_v, const Tensor& segments, const Tensor& chain,
                                     double scale, int64_t window, double softcap, int64_t spare);
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const OptionalTensor& prefix_k,
                                                      const OptionalTensor& prefix_v, const Tensor& out,
                                                      const Tensor& lse, const Tensor& segments, const Tensor& chain,
                                                      double scale, int64_t window, double softcap, int64_t spare);
int64_t attention_workspace(const Tensor& segments, const Tensor& chain, int64_t heads, int64_t key_heads,
                            int64_t width, int64_t window, bool bf16, bool backward);
// Bytes that a product of ours holds, or -1 where the library multiplies.
int64_t product_workspace(int64_t rows, int64_t depth, int64_t columns, bool bf16);
// Keeps W as panels for x W^T, with `backward` also for dy W, beside W, which must not change; the bytes that they take.
int64_t keep_packed(const Tensor& weight, bool backward);
void forget_packed(const Tensor& weight);
// What `keep_packed` would take.
int64_t packed_bytes(IntArrayRef shape, bool bf16, bool backward);
// Bytes that lora_linear and its backward pass hold at most; nothing while the library multiplies.
int64_t lora_workspace(int64_t out, int64_t width, IntArrayRef ranks, IntArrayRef rows, IntArrayRef run_offsets,
                       bool bf16);
int64_t lora_backward_workspace(int64_t out, int64_t width, IntArrayRef ranks, IntArrayRef rows,
                                IntArrayRef run_offsets, bool bf16, bool dropped, bool need_x);
int64_t label_loss_chunk();
int64_t label_loss_stride(int64_t vocabulary, int64_t element_size);
std::string isa();
void memory_start();
std::tuple<int64_t, int64_t, int64_t> memory_stop();
std::tuple<int64_t, int64_t, int64_t> memory_now();
void memory_reset_peak();
void memory_retain();

}  // namespace peftdyno
