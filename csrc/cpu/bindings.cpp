// Registration of the operators and the module that Python imports; nothing else.
#include <torch/library.h>

#include "direct.h"
#include "kernels.h"
#include "operators.h"
#include "tape_module.h"

namespace peftdyno {

std::string isa() {
  return kernels().name;
}

}  // namespace peftdyno

TORCH_LIBRARY(peftdyno_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, int[] run_offsets, float eps, float offset, int spare)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, int[] run_offsets,"
        " float offset, bool need_weight) -> (Tensor, Tensor)");
  m.def("glu(Tensor gate_up, Tensor? scale, str activation, int[] run_offsets, int spare) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor gate_up, Tensor? scale, str activation, int[] run_offsets, int spare)"
        " -> (Tensor, Tensor)");
  m.def("rotary_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, bool inverse) -> ()");
  m.def("bank_scale_(Tensor(a!) y, Tensor scale, int column, int[] run_offsets) -> ()");
  m.def("bank_shift_(Tensor(a!) y, Tensor shift, int column, int[] run_offsets) -> ()");
  m.def("bank_column_sums(Tensor dy, Tensor? before, int column, int width, int[] run_offsets) -> Tensor");
  m.def("scale_rows(Tensor x, Tensor factors) -> Tensor");
  m.def("adamw_(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, float[] rates, float[] clips, int[] steps,"
        " float beta1, float beta2, float eps, float decay) -> ()");
  m.def("label_loss(Tensor x, Tensor head, Tensor targets, float softcap, bool need_gradient) -> (Tensor, Tensor)");
  m.def("nf4_dequantise(Tensor codes, Tensor absmax, Tensor codebook, int rows, int columns, ScalarType dtype)"
        " -> Tensor");
  m.def("nf4_absmax(Tensor codes, Tensor absmax, Tensor offsets, Tensor book, int[] sizes) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int spare) -> Tensor");
  m.def("linear_backward(Tensor dy, Tensor weight) -> Tensor");
  m.def("lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scaling, int[] rows,"
        " int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, int x_spare, int border, int spare)"
        " -> (Tensor, Tensor)");
  m.def("lora_linear_backward(Tensor dy, Tensor x, Tensor u, Tensor weight, Tensor[] a, Tensor[] b,"
        " float[] scaling, int[] rows, int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, int border,"
        " bool need_x) -> (Tensor, Tensor[], Tensor[])");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor segments, Tensor chain,"
        " float scale, int window, float softcap, int spare) -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v,"
        " Tensor out, Tensor lse, Tensor segments, Tensor chain, float scale, int window, float softcap, int spare)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("attention_workspace(Tensor segments, Tensor chain, int heads, int key_heads, int width, int window, bool bf16,"
        " bool backward) -> int");
  m.def("product_workspace(int rows, int depth, int columns, bool bf16) -> int",
        &peftdyno::product_workspace);
  m.def("lora_workspace(int out, int width, int[] ranks, int[] rows, int[] run_offsets, bool bf16) -> int",
        &peftdyno::lora_workspace);
  m.def("lora_backward_workspace(int out, int width, int[] ranks, int[] rows, int[] run_offsets, bool bf16,"
        " bool dropped, bool need_x) -> int",
        &peftdyno::lora_backward_workspace);
  m.def("keep_packed(Tensor weight, bool backward) -> int", &peftdyno::keep_packed);
  m.def("forget_packed(Tensor weight) -> ()", &peftdyno::forget_packed);
  m.def("packed_bytes(int[] shape, bool bf16, bool backward) -> int", &peftdyno::packed_bytes);
  m.def("label_loss_chunk() -> int", &peftdyno::label_loss_chunk);
  m.def("label_loss_stride(int vocabulary, int element_size) -> int", &peftdyno::label_loss_stride);
  m.def("isa() -> str", &peftdyno::isa);
  m.def("use_isa(str name) -> ()", [](c10::string_view name) { peftdyno::use_isa(std::string(name).c_str()); });
  m.def("memory_start() -> ()", &peftdyno::memory_start);
  m.def("memory_stop() -> (int, int, int)", &peftdyno::memory_stop);
  m.def("memory_now() -> (int, int, int)", &peftdyno::memory_now);
  m.def("memory_reset_peak() -> ()", &peftdyno::memory_reset_peak);
  m.def("memory_retain() -> ()", &peftdyno::memory_retain);
}

TORCH_LIBRARY_IMPL(peftdyno_cpu, CPU, m) {
  m.impl("rms_norm", &peftdyno::rms_norm);
  m.impl("rms_norm_backward", &peftdyno::rms_norm_backward);
  m.impl("glu", &peftdyno::glu);
  m.impl("glu_backward", &peftdyno::glu_backward);
  m.impl("rotary_", &peftdyno::rotary_);
  m.impl("bank_scale_", &peftdyno::bank_scale_);
  m.impl("bank_shift_", &peftdyno::bank_shift_);
  m.impl("bank_column_sums", &peftdyno::bank_column_sums);
  m.impl("scale_rows", &peftdyno::scale_rows);
  m.impl("adamw_", &peftdyno::adamw_);
  m.impl("label_loss", &peftdyno::label_loss);
  m.impl("nf4_dequantise", &peftdyno::nf4_dequantise);
  m.impl("nf4_absmax", &peftdyno::nf4_absmax);
  m.impl("linear", &peftdyno::linear);
  m.impl("linear_backward", &peftdyno::linear_backward);
  m.impl("lora_linear", &peftdyno::lora_linear);
  m.impl("lora_linear_backward", &peftdyno::lora_linear_backward);
  m.impl("attention", &peftdyno::attention);
  m.impl("attention_backward", &peftdyno::attention_backward);
  m.impl("attention_workspace", &peftdyno::attention_workspace);
}

PYBIND11_MODULE(_cpu, m) {
  peftdyno::define<&peftdyno::rms_norm>(m, "rms_norm");
  peftdyno::define<&peftdyno::rms_norm_backward>(m, "rms_norm_backward");
  peftdyno::define<&peftdyno::glu>(m, "glu");
  peftdyno::define<&peftdyno::glu_backward>(m, "glu_backward");
  peftdyno::define<&peftdyno::rotary_>(m, "rotary_");
  peftdyno::define<&peftdyno::bank_scale_>(m, "bank_scale_");
  peftdyno::define<&peftdyno::bank_shift_>(m, "bank_shift_");
  peftdyno::define<&peftdyno::bank_column_sums>(m, "bank_column_sums");
  peftdyno::define<&peftdyno::scale_rows>(m, "scale_rows");
  peftdyno::define<&peftdyno::adamw_>(m, "adamw_");
  peftdyno::define<&peftdyno::label_loss>(m, "label_loss");
  peftdyno::define<&peftdyno::linear>(m, "linear");
  peftdyno::define<&peftdyno::linear_backward>(m, "linear_backward");
  peftdyno::define<&peftdyno::lora_linear>(m, "lora_linear");
  peftdyno::define<&peftdyno::lora_linear_backward>(m, "lora_linear_backward");
  peftdyno::define<&peftdyno::attention>(m, "attention");
  peftdyno::define<&peftdyno::attention_backward>(m, "attention_backward");
  peftdyno::define_tape(m);
}
