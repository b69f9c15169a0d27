// Gated activation on rows; equations in kernels/glu.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

struct ValueAndSlope {
  Vec value, slope;
};

struct Silu {
  PEFTDYNO_INLINE ValueAndSlope at(Vec x) {
    Vec s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
};

struct GeluTanh {
  PEFTDYNO_INLINE ValueAndSlope at(Vec x) {
    const float c = 0.7978845608028654f, cubic = 0.044715f;  // sqrt(2 / pi)
    Vec near = minimum(broadcast(30.0f), maximum(broadcast(-30.0f), x));  // beyond, t is 1 or -1
    Vec square = near * near;
    Vec t = tanh(c * (near + cubic * square * near));
    Vec slope = 0.5f * (1.0f + t) + 0.5f * near * (1.0f - t * t) * c * (1.0f + 3 * cubic * square);
    return {0.5f * x * (1.0f + t), slope};
  }
};

template <class T, class F>
static void glu_forward_rows(const GluForward& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = row_of<T>(a.gate_up, row);
    const T* up = gate + a.width;
    T* y = row_of<T>(a.y, row);
    const float* scale = nullptr;
    if (a.scale.values != nullptr) {
      run = run_of(row, a.scale.offsets, a.scale.num_runs, run);
      scale = a.scale.values + run * a.width;
    }
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      ask_for(gate + a.gate_up.stride + i);
      ask_for(up + a.gate_up.stride + i);
      Vec v = F::at(load_upto(gate + i, left)).value * load_upto(up + i, left);
      if (scale != nullptr) v *= load_upto(scale + i, left);
      store_upto(y + i, v, left);
    }
  }
}

template <class T, class F>
static void glu_backward_rows(const GluBackward& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = row_of<T>(a.gate_up, row), *up = gate + a.width, *dy = row_of<T>(a.dy, row);
    T *dgate = row_of<T>(a.dgate_up, row), *dup = dgate + a.width;
    const float* scale = nullptr;
    float* dscale = nullptr;
    if (a.scale.values != nullptr) {
      run = run_of(row, a.scale.offsets, a.scale.num_runs, run);
      scale = a.scale.values + run * a.width;
      dscale = a.dscale + run * a.width;
    }
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      ask_for(gate + a.gate_up.stride + i);
      ask_for(up + a.gate_up.stride + i);
      ask_for(dy + a.dy.stride + i);
      ValueAndSlope f = F::at(load_upto(gate + i, left));
      Vec grad = load_upto(dy + i, left), u = load_upto(up + i, left);
      if (scale != nullptr) {
        store_upto(dscale + i, load_upto(dscale + i, left) + grad * f.value * u, left);
        grad *= load_upto(scale + i, left);
      }
      store_upto(dgate + i, grad * u * f.slope, left);
      store_upto(dup + i, grad * f.value, left);
    }
  }
}

static void glu_forward(const GluForward& a, int64_t begin, int64_t end) {
  if (a.activation == Activation::silu)
    a.bf16 ? glu_forward_rows<bfloat16, Silu>(a, begin, end) : glu_forward_rows<float, Silu>(a, begin, end);
  else
    a.bf16 ? glu_forward_rows<bfloat16, GeluTanh>(a, begin, end) : glu_forward_rows<float, GeluTanh>(a, begin, end);
}

static void glu_backward(const GluBackward& a, int64_t begin, int64_t end) {
  if (a.activation == Activation::silu)
    a.bf16 ? glu_backward_rows<bfloat16, Silu>(a, begin, end) : glu_backward_rows<float, Silu>(a, begin, end);
  else
    a.bf16 ? glu_backward_rows<bfloat16, GeluTanh>(a, begin, end) : glu_backward_rows<float, GeluTanh>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
