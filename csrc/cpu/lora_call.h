// The terms and tasks of one call of lora_linear or its backward pass, and the memory they take.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lora_plan.h"
#include "operators.h"
#include "tensors.h"

namespace peftdyno {

// Packed forms of the factors.
enum Operand { DOWN = 1, DOWN_ROWS = 2, UP = 4, UP_TRANSPOSED = 8 };

// Sizes of a call: all that follows from shapes.
struct LoraShape {
  Lora lora{};
  std::vector<LoraTerm> terms;
  std::vector<LoraTask> tasks;
  std::vector<int64_t> run_offsets;
  int64_t tokens = 0, u_width = 0, gradient_size = 0, largest_rank = 0;

  LoraShape(bool bf16, int64_t width, IntArrayRef ranks, IntArrayRef rows, IntArrayRef offsets)
      : run_offsets(offsets.vec()), tokens(offsets.back()) {
    lora.bf16 = bf16;
    lora.width = width;
    lora.keep_scale = 1.0f;
    lora.num_modules = static_cast<int64_t>(ranks.size());
    lora.num_runs = static_cast<int64_t>(run_offsets.size()) - 1;
    for (int64_t m = 0; m < lora.num_modules; ++m) {
      for (int64_t j = 0; j < lora.num_runs; ++j) add_term(ranks[m], rows[2 * m], rows[2 * m + 1] - rows[2 * m]);
      largest_rank = std::max(largest_rank, padded_to(ranks[m], 32));
      u_width += ranks[m];
    }
    add_tasks();
  }

  void add_term(int64_t rank, int64_t out_column, int64_t out_width) {
    LoraTerm term{};
    term.rank = rank;
    term.padded_rank = padded_to(rank, 32);
    term.out_column = out_column;
    term.out_width = out_width;
    term.u_column = u_width;
    term.gradient = gradient_size;
    gradient_size += padded_to(rank, 16) * (padded_to(lora.width, 32) + padded_to(out_width, 32));
    terms.push_back(term);
  }

  // Blocks of the tokens of each run; smaller ones where there would be too few for the threads.
  void add_tasks() {
    const int64_t threads = at::get_num_threads(), share = padded_to((tokens + threads - 1) / threads, 32);
    const int64_t rows = std::max<int64_t>(32, std::min(LORA_ROWS, share));
    for (int64_t j = 0; j < lora.num_runs; ++j)
      for (int64_t row = run_offsets[j]; row < run_offsets[j + 1]; row += rows)
        tasks.push_back({j, row, std::min(rows, run_offsets[j + 1] - row)});
  }

  int64_t threads() const {
    return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(tasks.size())));
  }

  int64_t operand_bytes(const LoraTerm& term, int64_t columns) const {
    return padded_to(padded_to(columns, 32) * term.padded_rank * kernels().operand_bytes(lora.bf16), 64);
  }

  int64_t packed_bytes(int operands) const {
    int64_t total = 0;
    for (const LoraTerm& term : terms) {
      const int64_t in = operand_bytes(term, lora.width), out = operand_bytes(term, term.out_width);
      total += in * (!!(operands & DOWN) + !!(operands & DOWN_ROWS));
      total += out * (!!(operands & UP) + !!(operands & UP_TRANSPOSED));
    }
    return total;
  }

  int64_t packing_threads() const {
    return std::min<int64_t>(at::get_num_threads(), 2 * static_cast<int64_t>(terms.size()));
  }

  // A converted factor and pointers to its rows, for one thread.
  int64_t packing_bytes() const {
    int64_t largest = 0;
    for (const LoraTerm& term : terms) {
      const int64_t factor = std::max(operand_bytes(term, lora.width), operand_bytes(term, term.out_width));
      largest = std::max(largest, factor + padded_to(std::max(term.rank, term.out_width) * 8, 64));
    }
    return largest + 128;
  }

  // Upper bound of what a task takes from one thread's scratch.
  int64_t scratch_bytes() const {
    const int64_t whole_rows = 16 * padded_to(lora.width, LORA_STRIP) * 4;
    return padded_to(LORA_ROWS * (4 * largest_rank * 4 + LORA_STRIP * (2 + 4 + 4)) + whole_rows + 16 * 64, 64);
  }
};

// The same with its tensors.
struct LoraCall : LoraShape {
  std::vector<Tensor> factors;
  Tensor packed, streams;

  LoraCall(const Tensor& x, TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
           IntArrayRef run_offsets, double dropout, const OptionalTensor& token_streams, const OptionalTensor& keys)
      : LoraShape(is_bf16(x), x.size(1), ranks_of(a), rows, run_offsets) {
    TORCH_CHECK(tokens == x.size(0), "run_offsets must bound the rows of every run");
    lora.x = rows_of(x);
    set_dropout(dropout, token_streams, keys);
    const Tensor key_table = lora.dropped ? keys->contiguous() : Tensor();
    for (int64_t m = 0; m < lora.num_modules; ++m) {
      TORCH_CHECK(a[m].scalar_type() == at::kFloat && b[m].scalar_type() == at::kFloat, "factors are fp32");
      const Tensor down = whole_runs(a[m]), up = whole_runs(b[m]);
      const int64_t rank = down.size(1), out = rows[2 * m + 1] - rows[2 * m];
      TORCH_CHECK(down.size(2) == lora.width && up.size(1) == out && up.size(2) == rank, "factors do not fit the weight");
      for (int64_t j = 0; j < lora.num_runs; ++j) {
        LoraTerm& term = terms[m * lora.num_runs + j];
        term.up_scale = static_cast<float>(scaling[m * lora.num_runs + j]);
        if (lora.dropped) term.key = static_cast<uint64_t>(key_table.data_ptr<int64_t>()[m * lora.num_runs + j]);
        term.a = down.data_ptr<float>() + j * down.stride(0);
        term.b = up.data_ptr<float>() + j * up.stride(0);
      }
      factors.push_back(down);
      factors.push_back(up);
    }
    lora.terms = terms.data();
    lora.tasks = tasks.data();
  }

  // Factors whose runs may lie apart, as in a bank.
  static Tensor whole_runs(const Tensor& factors) {
    const bool whole = factors.stride(2) == 1 && factors.stride(1) == factors.size(2);
    return whole ? factors : factors.contiguous();
  }

  static std::vector<int64_t> ranks_of(TensorList a) {
    std::vector<int64_t> ranks;
    for (const Tensor& factor : a) ranks.push_back(factor.size(1));
    return ranks;
  }

  void set_dropout(double dropout, const OptionalTensor& token_streams, const OptionalTensor& keys) {
    if (dropout == 0.0) return;
    TORCH_CHECK(token_streams.has_value() && keys.has_value() && token_streams->size(0) == tokens,
                "dropout needs a stream for each token and the keys");
    const int64_t threshold = std::llrint(dropout * 65536);
    TORCH_CHECK(threshold >= 0 && threshold < 65536, "dropout ", dropout, " is not below 1");
    lora.dropped = true;
    lora.threshold = static_cast<uint16_t>(threshold);
    lora.keep_scale = static_cast<float>(1.0 / (1.0 - threshold / 65536.0));
    streams = token_streams->contiguous();
    lora.streams = streams.data_ptr<int64_t>();
  }

  // Packs the named operands of every term.
  void pack(int operands, const Tensor& like) {
    packed = at::empty({packed_bytes(operands)}, like.options().dtype(at::kByte));
    uint8_t* next = packed.data_ptr<uint8_t>();
    auto place = [&](int operand, int64_t bytes) -> void* {
      if (!(operands & operand)) return nullptr;
      next += bytes;
      return next - bytes;
    };
    for (LoraTerm& term : terms) {
      term.down = place(DOWN, operand_bytes(term, lora.width));
      term.down_rows = place(DOWN_ROWS, operand_bytes(term, lora.width));
      term.up = place(UP, operand_bytes(term, term.out_width));
      term.up_transposed = place(UP_TRANSPOSED, operand_bytes(term, term.out_width));
    }
    const Tensor scratch = at::empty({packing_threads(), packing_bytes()}, like.options().dtype(at::kByte));
    at::parallel_for(0, 2 * static_cast<int64_t>(terms.size()), 1, [&](int64_t begin, int64_t end) {
      void* mine = scratch.data_ptr<uint8_t>() + at::get_thread_num() * scratch.size(1);
      for (int64_t i = begin; i < end; ++i) kernels().lora_pack(lora, terms[i / 2], i % 2 == 1, mine);
    });
  }

  // f(thread, first task, last task, scratch)
  template <class F>
  void for_shares(const Tensor& like, const F& f) const {
    const int64_t shares = threads(), count = static_cast<int64_t>(tasks.size());
    const Tensor scratch = at::empty({shares, scratch_bytes()}, like.options().dtype(at::kByte));
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        f(t, count * t / shares, count * (t + 1) / shares, scratch.data_ptr<uint8_t>() + t * scratch.size(1));
    });
  }
};

}  // namespace peftdyno
