// Cross-entropy of rows of logits and its gradient in their place; equations in kernels/label_loss.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

// c tanh(z / c), or z where c is 0.
PEFTDYNO_INLINE Vec capped(Vec z, float c) {
  return c != 0.0f ? c * tanh(z / c) : z;
}

template <class T>
static float row_maximum(const T* z, int64_t n) {
  Vec best[4];
  for (Vec& b : best) b = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int64_t j = 0; j < 4; ++j) best[j] = maximum(load(z + i + j * LANES), best[j]);
  float result = largest(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
  for (; i < n; ++i) {
    float value = load_some(z + i, 1)[0];
    result = value > result ? value : result;
  }
  return result;
}

// Sum of exp(capped z - top), the last partial vector with its missing elements left out.
template <class T>
static float row_exponentials(const T* z, int64_t n, float softcap, float top) {
  Vec total[2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    for (int64_t j = 0; j < 2; ++j) total[j] += exp(capped(load(z + i + j * LANES), softcap) - top);
  float result = sum(total[0] + total[1]);
  for (; i < n; ++i) result += exp(capped(load_some(z + i, 1), softcap) - top)[0];
  return result;
}

template <class T>
static void row_gradient(T* z, int64_t n, int64_t target, float softcap, float lse) {
  Vec at_target = capped(load_some(z + target, 1), softcap);
  for (int64_t i = 0; i < n; i += LANES) {
    Vec y = capped(load_upto(z + i, n - i), softcap);
    Vec p = exp(y - lse);
    if (softcap != 0.0f) p *= 1.0f - (y / softcap) * (y / softcap);
    store_upto(z + i, p, n - i);
  }
  Vec d = exp(at_target - lse) - 1.0f;
  if (softcap != 0.0f) d *= 1.0f - (at_target / softcap) * (at_target / softcap);
  store_some(z + target, d, 1);
}

template <class T>
static void label_loss_rows(const LabelLoss& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = row_of<T>(a.logits, row);
    float top = capped(broadcast(row_maximum(z, a.vocabulary)), a.softcap)[0];
    float lse = top + __builtin_logf(row_exponentials(z, a.vocabulary, a.softcap, top));
    a.loss[row] = lse - capped(load_some(z + a.targets[row], 1), a.softcap)[0];
    if (a.need_gradient) row_gradient(z, a.vocabulary, a.targets[row], a.softcap, lse);
  }
}

static void label_loss(const LabelLoss& a, int64_t begin, int64_t end) {
  a.bf16 ? label_loss_rows<bfloat16>(a, begin, end) : label_loss_rows<float>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
