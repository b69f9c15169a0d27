// AdamW on a range of one run's parameters; equations in kernels/adamw.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

static void adamw(const AdamW& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += LANES) {
    int64_t left = end - i;
    Vec g = load_upto(a.g + i, left) * a.clip;
    Vec m = load_upto(a.m + i, left) * a.beta1 + g * a.fresh1;
    Vec v = load_upto(a.v + i, left) * a.beta2 + g * g * a.fresh2;
    store_upto(a.m + i, m, left);
    store_upto(a.v + i, v, left);
    Vec update = m / (sqrt(v) * a.root_correction + a.eps);
    store_upto(a.p + i, load_upto(a.p + i, left) * a.keep - update * a.step_size, left);
  }
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
