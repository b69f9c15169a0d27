// Scales, shifts and column sums on rows; equations in kernels/bank_affine.py.
#pragma once

#include "simd.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

template <class T>
static void bank_affine_rows(const BankAffine& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    run = run_of(row, a.values.offsets, a.values.num_runs, run);
    const float* values = a.values.values + run * a.width;
    T* y = row_of<T>(a.y, row);
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      Vec v = load_upto(y + i, left), w = load_upto(values + i, left);
      store_upto(y + i, a.multiply ? v * w : v + w, left);
    }
  }
}

template <class T>
static void column_sums_rows(const ColumnSums& a, int64_t begin, int64_t end) {
  int64_t run = 0;
  for (int64_t row = begin; row < end; ++row) {
    run = run_of(row, a.offsets, a.num_runs, run);
    float* sums = a.sums + run * a.width;
    const T* dy = row_of<T>(a.dy, row);
    const T* before = a.before.data != nullptr ? row_of<T>(a.before, row) : nullptr;
    for (int64_t i = 0; i < a.width; i += LANES) {
      int64_t left = a.width - i;
      Vec v = load_upto(dy + i, left);
      if (before != nullptr) v *= load_upto(before + i, left);
      store_upto(sums + i, load_upto(sums + i, left) + v, left);
    }
  }
}

template <class T>
static void scale_rows_rows(const ScaleRows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(a.x, row);
    T* y = row_of<T>(a.y, row);
    for (int64_t i = 0; i < a.width; i += LANES)
      store_upto(y + i, load_upto(x + i, a.width - i) * a.factors[row], a.width - i);
  }
}

static void bank_affine(const BankAffine& a, int64_t begin, int64_t end) {
  a.bf16 ? bank_affine_rows<bfloat16>(a, begin, end) : bank_affine_rows<float>(a, begin, end);
}

static void column_sums(const ColumnSums& a, int64_t begin, int64_t end) {
  a.bf16 ? column_sums_rows<bfloat16>(a, begin, end) : column_sums_rows<float>(a, begin, end);
}

static void scale_rows(const ScaleRows& a, int64_t begin, int64_t end) {
  a.bf16 ? scale_rows_rows<bfloat16>(a, begin, end) : scale_rows_rows<float>(a, begin, end);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
