// RMS norm on rows; equations in kernels/rms_norm.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

// h = x + residual rounded to T, as the residual stream holds it; returns the sum of h^2.
template <class T>
PEFTDYNO_INLINE float add_and_square(const T* x, int64_t stride, const T* residual, T* h, int64_t width) {
  Vec squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    ask_for(x + stride + i);
    Vec v = load_upto(x + i, width - i);
    if (residual != nullptr) {
      store_upto(h + i, v + load_upto(residual + i, width - i), width - i);
      v = load_upto(h + i, width - i);
    }
    squares += v * v;
  }
  return sum(squares);
}

template <class T>
static void norm_forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    run = run_of(row, a.weight.offsets, a.weight.num_runs, run);
    const float* weight = a.weight.values + run * a.width;
    const bool add = a.residual.data != nullptr;
    T* h = add ? row_of<T>(a.h, row) : row_of<T>(a.x, row);
    const T* residual = add ? row_of<T>(a.residual, row) : nullptr;
    float squares = add_and_square<T>(row_of<T>(a.x, row), a.x.stride, residual, h, a.width);
    float rstd = 1.0f / __builtin_sqrtf(squares / a.width + a.eps);
    a.rstd[row] = rstd;
    T* y = row_of<T>(a.y, row);
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      store_upto(y + i, load_upto(h + i, left) * rstd * load_upto(weight + i, left), left);
    }
  }
}

template <class T>
static void norm_backward_rows(const NormBackward& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    run = run_of(row, a.weight.offsets, a.weight.num_runs, run);
    const float* weight = a.weight.values + run * a.width;
    const T *dy = row_of<T>(a.dy, row), *h = row_of<T>(a.h, row);
    const T* dh = a.dh.data != nullptr ? row_of<T>(a.dh, row) : nullptr;
    T* dx = row_of<T>(a.dx, row);
    const float rstd = a.rstd[row];
    Vec products = {};
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      ask_for(dy + a.dy.stride + i);
      ask_for(h + a.h.stride + i);
      products += load_upto(dy + i, left) * load_upto(weight + i, left) * (load_upto(h + i, left) * rstd);
    }
    const float mean = sum(products) / a.width;
    float* dweight = a.dweight != nullptr ? a.dweight + run * a.width : nullptr;
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      Vec grad = load_upto(dy + i, left), normed = load_upto(h + i, left) * rstd;
      Vec d = rstd * (grad * load_upto(weight + i, left) - normed * mean);
      if (dh != nullptr) d += load_upto(dh + i, left);
      store_upto(dx + i, d, left);
      if (dweight != nullptr) store_upto(dweight + i, load_upto(dweight + i, left) + grad * normed, left);
    }
  }
}

static void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  a.bf16 ? norm_forward_rows<bfloat16>(a, begin, end) : norm_forward_rows<float>(a, begin, end);
}

static void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  a.bf16 ? norm_backward_rows<bfloat16>(a, begin, end) : norm_backward_rows<float>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
