// The terms, tasks and strips of one call of lora_linear or its backward pass, and the memory they take.
#pragma once

#include <array>
#include <cmath>

#include "operators.h"
#include "product.h"

namespace peftdyno {

// Packed forms of the factors.
enum Operand { DOWN = 1, DOWN_ROWS = 2, UP = 4, UP_TRANSPOSED = 8 };

// Sizes of a call: all that follows from shapes.
struct LoraShape {
  Lora lora{};
  std::vector<LoraTerm> terms;
  std::vector<LoraTask> tasks;
  std::vector<int64_t> run_offsets;
  int64_t u_width = 0, largest_rank = 0;

  LoraShape(bool bf16, int64_t width, IntArrayRef ranks, IntArrayRef rows, IntArrayRef offsets)
      : run_offsets(offsets.vec()) {
    lora.bf16 = bf16;
    lora.width = width;
    lora.num_tokens = offsets.back();
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
    terms.push_back(term);
  }

  // Blocks of the tokens of each run; smaller ones where there would be too few for the threads.
  void add_tasks() {
    const int64_t share = padded_to(ratio_up(lora.num_tokens, 4 * at::get_num_threads()), 32);
    const int64_t rows = std::max<int64_t>(32, std::min(LORA_ROWS, share));
    for (int64_t j = 0; j < lora.num_runs; ++j)
      for (int64_t row = run_offsets[j]; row < run_offsets[j + 1]; row += rows)
        tasks.push_back({j, row, std::min(rows, run_offsets[j + 1] - row)});
  }

  std::vector<LoraStrip> strips() const {
    std::vector<LoraStrip> found;
    for (int64_t j = 0; j < lora.num_runs; ++j) {
      for (int64_t column = 0; column < lora.width; column += LORA_STRIP) found.push_back({j, -1, column});
      for (int64_t m = 0; m < lora.num_modules; ++m)
        for (int64_t column = 0; column < terms[m * lora.num_runs].out_width; column += LORA_STRIP)
          found.push_back({j, m, column});
    }
    return found;
  }

  int64_t element_bytes() const { return kernels().operand_bytes(lora.bf16); }

  int64_t operand_bytes(const LoraTerm& term, int64_t columns) const {
    return padded_to(padded_to(columns, 32) * term.padded_rank * element_bytes(), 64);
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

  // du [N, padded_rank] of one module; tasks read whole blocks of rows.
  int64_t du_bytes(const LoraTerm& term) const {
    return padded_to((lora.num_tokens + LORA_ROWS) * term.padded_rank * element_bytes(), 64);
  }

  // A transposed operand of one term's run.
  int64_t transposed_bytes(int64_t t) const {
    const int64_t run = t % lora.num_runs, tokens = run_offsets[run + 1] - run_offsets[run];
    return padded_to(padded_to(terms[t].rank, 16) * padded_to(tokens, 32) * element_bytes(), 64);
  }

  int64_t mask_bytes() const {
    return padded_to(ratio_up(lora.width, LORA_STRIP) * lora.num_tokens * STRIP_WORDS * 4, 64);
  }

  // What the backward pass holds for all threads beside the packed factors.
  int64_t gradient_bytes(bool masks) const {
    int64_t total = 0;
    for (int64_t t = 0; t < static_cast<int64_t>(terms.size()); ++t) {
      total += 2 * transposed_bytes(t);
      if (t % lora.num_runs == 0) total += du_bytes(terms[t]) + (masks ? mask_bytes() : 0);
    }
    return total;
  }

  // Upper bound of what one thread takes from its scratch for packing, tasks and strips.
  int64_t scratch_bytes() const {
    int64_t packing = 0, sums = 0;
    for (const LoraTerm& term : terms)
      packing = std::max(packing, std::max(operand_bytes(term, lora.width), operand_bytes(term, term.out_width)) +
                                      8 * term.padded_rank);
    for (int64_t m = 0; m < lora.num_modules; ++m)
      sums += 4 * LORA_STRIP * padded_to(terms[m * lora.num_runs].rank, 16);
    const int64_t put = 4 * PUT_ROWS * LORA_STRIP;
    const int64_t task = LORA_ROWS * (4 * (2 * largest_rank + LORA_STRIP + STRIP_WORDS)) + put;
    const int64_t strip = LORA_CHUNK * (LORA_STRIP * element_bytes() + 4 * STRIP_WORDS) + put +
                          std::max(sums, 2 * 4 * LORA_STRIP * largest_rank);
    return padded_to(std::max({packing, task, strip}) + 16 * 64, 64);
  }

  // (threads, bytes that each holds), with a product in the same region that wants so many; zeros for none.
  std::array<int64_t, 2> scratch(int64_t product_threads, int64_t product_bytes) const {
    return {std::max(threads_for(static_cast<int64_t>(tasks.size())), product_threads),
            std::max(scratch_bytes(), product_bytes)};
  }
};

// The same with its tensors.
struct LoraCall : LoraShape {
  std::vector<Tensor> factors;
  Tensor packed, streams, held;
  uint8_t* next = nullptr;

  LoraCall(const Tensor& x, TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
           IntArrayRef offsets, double dropout, const OptionalTensor& token_streams, const OptionalTensor& keys)
      : LoraShape(is_bf16(x), x.size(1), ranks_of(a), rows, offsets) {
    TORCH_CHECK(offsets.front() == 0 && lora.num_tokens == x.size(0), "run_offsets must bound the rows of every run");
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
    lora.run_offsets = run_offsets.data();
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
    TORCH_CHECK(token_streams.has_value() && keys.has_value() && token_streams->size(0) == lora.num_tokens,
                "dropout needs a stream for each token and the keys");
    const int64_t threshold = std::llrint(dropout * 65536);
    TORCH_CHECK(threshold >= 0 && threshold < 65536, "dropout ", dropout, " is not below 1");
    lora.dropped = true;
    lora.threshold = static_cast<uint16_t>(threshold);
    lora.keep_scale = static_cast<float>(1.0 / (1.0 - threshold / 65536.0));
    streams = token_streams->contiguous();
    lora.streams = streams.data_ptr<int64_t>();
  }

  void* place(int64_t bytes) {
    next += bytes;
    return next - bytes;
  }

  // Memory for the named operands of every term.
  void place_operands(int operands, const Tensor& like) {
    packed = at::empty({packed_bytes(operands)}, like.options().dtype(at::kByte));
    next = packed.data_ptr<uint8_t>();
    for (LoraTerm& term : terms) {
      const int64_t in = operand_bytes(term, lora.width), out = operand_bytes(term, term.out_width);
      if (operands & DOWN) term.down = place(in);
      if (operands & DOWN_ROWS) term.down_rows = place(in);
      if (operands & UP) term.up = place(out);
      if (operands & UP_TRANSPOSED) term.up_transposed = place(out);
    }
  }

  // Memory for what the backward pass makes first.
  void place_gradients(bool masks, const Tensor& like) {
    held = at::empty({gradient_bytes(masks)}, like.options().dtype(at::kByte));
    next = held.data_ptr<uint8_t>();
    for (int64_t t = 0; t < static_cast<int64_t>(terms.size()); ++t) {
      LoraTerm &term = terms[t], &first = terms[t / lora.num_runs * lora.num_runs];
      if (t % lora.num_runs == 0) {
        term.du = place(du_bytes(term));
        if (masks) term.masks = static_cast<uint32_t*>(place(mask_bytes()));
      }
      term.du = first.du;
      term.masks = first.masks;
      term.du_transposed = place(transposed_bytes(t));
      term.u_transposed = place(transposed_bytes(t));
    }
  }

  // s u B^T for the columns of each module.
  LowRankTerms up_terms() const {
    LowRankTerms joined{{}, run_offsets, false};
    for (const LoraTerm& t : terms) {
      const Rows left{static_cast<char*>(lora.u.data) + t.u_column * (lora.bf16 ? 2 : 4), lora.u.stride};
      joined.terms.push_back({t.out_column, t.out_width, t.rank, t.padded_rank, left, lora.bf16, t.up_transposed, nullptr});
    }
    return joined;
  }

  // mask (du A) for all columns.
  LowRankTerms down_terms() const {
    LowRankTerms joined{{}, run_offsets, true};
    for (const LoraTerm& t : terms)
      joined.terms.push_back({0, lora.width, t.rank, t.padded_rank, {t.du, t.padded_rank}, false, t.down_rows, t.masks});
    return joined;
  }
};

}  // namespace peftdyno
