// What every operator needs of its tensors: checks, row views, spare columns, and sums over rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"
#include "phases.h"

namespace peftdyno {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether x holds bfloat16; fp32 is the only other type the kernels take.
inline bool is_bf16(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
              "the C++ kernels take bfloat16 and float32, not ", x.scalar_type());
  return x.scalar_type() == at::kBFloat16;
}

// x itself where its rows are contiguous, else a copy.
inline Tensor with_unit_columns(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

// A contiguous [R, width] of fp32 as the vectors of the runs whose rows `run_offsets` bound, of `num_rows` in all.
inline RunVectors vectors_of_runs(const Tensor& values, int64_t width, IntArrayRef run_offsets, int64_t num_rows) {
  TORCH_CHECK(values.dim() == 2 && values.size(1) == width, values.sizes(), " does not hold a vector of ", width, " a run");
  TORCH_CHECK(static_cast<int64_t>(run_offsets.size()) == values.size(0) + 1 && run_offsets.front() == 0 &&
                  run_offsets.back() == num_rows,
              "run_offsets must bound the rows of every run");
  return {values.data_ptr<float>(), run_offsets.data(), values.size(0)};
}

inline Rows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.dim() > 1 ? x.stride(0) : x.size(0)};
}

// An uninitialised [rows, columns] tensor with `spare` unused columns to the right of each row in memory.
inline Tensor empty_with_spare(int64_t rows, int64_t columns, int64_t spare, const Tensor& like) {
  Tensor wide = at::empty({rows, columns + spare}, like.options());
  return spare == 0 ? wide : wide.narrow(1, 0, columns);
}

// A thread's part of scratch [threads, bytes].
inline void* part_of(const Tensor& scratch, int64_t thread) {
  return scratch.data_ptr<uint8_t>() + thread * scratch.size(1);
}

inline Tensor empty_float(IntArrayRef shape, const Tensor& like) {
  return at::empty(shape, like.options().dtype(at::kFloat));
}

// Sums over rows that threads gather apart and that are added in the threads' order, so that the result does not
// vary. A thread adds some rows at a time to a fresh part and that to its total: the error grows with the root of
// the number of rows and not with the number.
class RowSums {
 public:
  RowSums(IntArrayRef shape, const Tensor& like) : threads_(at::get_num_threads()) {
    std::vector<int64_t> full{threads_, 2};
    full.insert(full.end(), shape.begin(), shape.end());
    parts_ = at::zeros(full, like.options().dtype(at::kFloat));
  }

  // f(begin, end, sums) for shares of the rows; it adds to `sums`.
  template <class F>
  void over_rows(int64_t num_rows, int64_t width, const F& f) {
    const int64_t rows_at_a_time = 32;
    const int64_t size = parts_.numel() / (2 * threads_);
    const int64_t share = std::max<int64_t>(1, SOME_MICROSECONDS / std::max<int64_t>(1, width));
    at::parallel_for(0, num_rows, share, [&](int64_t begin, int64_t end) {
      float* total = parts_.data_ptr<float>() + at::get_thread_num() * 2 * size;
      float* fresh = total + size;
      for (int64_t row = begin; row < end; row += rows_at_a_time) {
        f(row, std::min(end, row + rows_at_a_time), fresh);
        for (int64_t i = 0; i < size; ++i) {
          total[i] += fresh[i];
          fresh[i] = 0.0f;
        }
      }
    });
  }

  Tensor total() const { return parts_.select(1, 0).sum(0); }

 private:
  int64_t threads_;
  Tensor parts_;
};

}  // namespace peftdyno
