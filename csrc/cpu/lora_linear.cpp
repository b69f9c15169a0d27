// Operators of kernels/lora_linear.py: the large products by the library, the skinny ones by kernels of our own.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "lora_plan.h"
#include "operators.h"
#include "tensors.h"

namespace peftdyno {
namespace {

// Below this many rows, writing s B beside W costs more than adding u B^T to y (docs/decisions/lora-products.md).
constexpr int64_t ROWS_WORTH_A_BORDER = 256;

enum Operand { DOWN = 1, DOWN_ROWS = 2, UP = 4, UP_TRANSPOSED = 8 };

// The terms and tasks of one call, and the memory of their packed factors.
struct Call {
  Lora lora{};
  std::vector<Tensor> factors;
  std::vector<LoraTerm> terms;
  std::vector<LoraTask> tasks;
  Tensor packed, streams;
  int64_t used_border = 0, u_width = 0, gradient_size = 0, largest_rank = 0;

  Call(const Tensor& x, TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
       IntArrayRef run_offsets, double dropout, const OptionalTensor& token_streams, const OptionalTensor& keys) {
    lora.bf16 = is_bf16(x);
    lora.width = x.size(1);
    lora.x = rows_of(x);
    lora.num_modules = static_cast<int64_t>(a.size());
    lora.num_runs = static_cast<int64_t>(run_offsets.size()) - 1;
    TORCH_CHECK(run_offsets.back() == x.size(0), "run_offsets must bound the rows of every run");
    set_dropout(dropout, token_streams, keys, x.size(0));
    add_terms(a, b, scaling, rows, keys);
    add_tasks(run_offsets);
  }

  void set_dropout(double dropout, const OptionalTensor& token_streams, const OptionalTensor& keys, int64_t tokens) {
    lora.keep_scale = 1.0f;
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

  void add_terms(TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                 const OptionalTensor& keys) {
    const int64_t num_runs = lora.num_runs;
    Tensor key_table = keys.has_value() ? keys->contiguous() : Tensor();
    for (int64_t m = 0; m < lora.num_modules; ++m) {
      TORCH_CHECK(a[m].scalar_type() == at::kFloat && b[m].scalar_type() == at::kFloat, "factors are fp32");
      const Tensor down = a[m].contiguous(), up = b[m].contiguous();
      const int64_t rank = down.size(1), padded_rank = padded_to(rank, 32), out = rows[2 * m + 1] - rows[2 * m];
      TORCH_CHECK(down.size(2) == lora.width && up.size(1) == out && up.size(2) == rank, "factors do not fit the weight");
      for (int64_t j = 0; j < num_runs; ++j) {
        LoraTerm term{};
        term.rank = rank;
        term.padded_rank = padded_rank;
        term.out_column = rows[2 * m];
        term.out_width = out;
        term.u_column = u_width;
        term.border_column = used_border;
        term.up_scale = static_cast<float>(scaling[m * num_runs + j]);
        term.key = lora.dropped ? static_cast<uint64_t>(key_table.data_ptr<int64_t>()[m * num_runs + j]) : 0;
        term.a = down.data_ptr<float>() + j * rank * lora.width;
        term.b = up.data_ptr<float>() + j * out * rank;
        term.gradient = gradient_size;
        gradient_size += padded_to(rank, 16) * (padded_to(lora.width, 32) + padded_to(out, 32));
        used_border += rank;
        terms.push_back(term);
      }
      largest_rank = std::max(largest_rank, padded_rank);
      u_width += rank;
      factors.push_back(down);
      factors.push_back(up);
    }
    lora.terms = terms.data();
  }

  // Blocks of the tokens of each run; smaller ones where there would be too few for the threads.
  void add_tasks(IntArrayRef run_offsets) {
    const int64_t share = padded_to(lora_tokens_a_thread(run_offsets.back()), 32);
    const int64_t rows = std::max<int64_t>(32, std::min(LORA_ROWS, share));
    for (int64_t j = 0; j < lora.num_runs; ++j)
      for (int64_t row = run_offsets[j]; row < run_offsets[j + 1]; row += rows)
        tasks.push_back({j, row, std::min(rows, run_offsets[j + 1] - row)});
    lora.tasks = tasks.data();
  }

  static int64_t lora_tokens_a_thread(int64_t tokens) {
    const int64_t threads = at::get_num_threads();
    return (tokens + threads - 1) / threads;
  }

  // Packs the named operands of every term.
  void pack(int operands, const Tensor& like) {
    const int64_t element = kernels().operand_bytes(lora.bf16);
    int64_t size = 0, largest = 0;
    for (int pass = 0; pass < 2; ++pass) {
      uint8_t* next = pass == 0 ? nullptr : packed.data_ptr<uint8_t>();
      auto place = [&](int operand, int64_t elements) -> void* {
        if (!(operands & operand)) return nullptr;
        void* p = next;
        const int64_t bytes = padded_to(elements * element, 64);
        size += pass == 0 ? bytes : 0;
        next += pass == 0 ? 0 : bytes;
        return p;
      };
      for (LoraTerm& term : terms) {
        const int64_t in = padded_to(lora.width, 32) * term.padded_rank, out = padded_to(term.out_width, 32) * term.padded_rank;
        term.down = place(DOWN, in);
        term.down_rows = place(DOWN_ROWS, in);
        term.up = place(UP, out);
        term.up_transposed = place(UP_TRANSPOSED, out);
        largest = std::max(largest, std::max(in, out) * element + padded_to(std::max(term.rank, term.out_width) * 8, 64));
      }
      if (pass == 0) packed = at::empty({size}, like.options().dtype(at::kByte));
    }
    const int64_t shares = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(terms.size()));
    const Tensor scratch = at::empty({shares, padded_to(largest, 64) + 128}, like.options().dtype(at::kByte));
    at::parallel_for(0, static_cast<int64_t>(terms.size()), 1, [&](int64_t begin, int64_t end) {
      void* mine = scratch.data_ptr<uint8_t>() + at::get_thread_num() * scratch.size(1);
      for (int64_t t = begin; t < end; ++t) kernels().lora_pack(lora, terms[t], mine);
    });
  }

  int64_t threads() const {
    return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(tasks.size())));
  }

  // Upper bound of what a task takes from its scratch.
  int64_t scratch_bytes() const {
    return LORA_ROWS * (4 * largest_rank * 4 + LORA_STRIP * (2 + 4 + 4)) + 16 * padded_to(lora.width, LORA_STRIP) * 4 + 16 * 64;
  }

  // f(thread, first task, last task, scratch)
  template <class F>
  void for_shares(const Tensor& like, const F& f) const {
    const int64_t shares = threads(), count = static_cast<int64_t>(tasks.size());
    const Tensor scratch = at::empty({shares, padded_to(scratch_bytes(), 64)}, like.options().dtype(at::kByte));
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        f(t, count * t / shares, count * (t + 1) / shares, scratch.data_ptr<uint8_t>() + t * scratch.size(1));
    });
  }
};

// The rows of x with `columns` more than it shows.
Tensor widened(const Tensor& x, int64_t columns) {
  return x.as_strided({x.size(0), x.size(1) + columns}, x.strides());
}

// Columns in memory to the right of each row that nothing else can see: the storage is this tensor's alone.
int64_t room_beside(const Tensor& x) {
  if (x.size(0) == 0 || x.stride(1) != 1 || x.storage().use_count() != 1) return 0;
  const int64_t room = x.stride(0) - x.size(1), end = x.storage_offset() + x.size(0) * x.stride(0);
  return end * x.element_size() <= static_cast<int64_t>(x.storage().nbytes()) ? room : 0;
}

// dx = [dy, du] [W; A]
Tensor product_with_border(Lora& lora, const Tensor& wide_dy, const Tensor& weight, Tensor& dx) {
  const Tensor wide = weight.as_strided({weight.size(0) + lora.border_width, weight.size(1)}, weight.strides());
  lora.weight_below = rows_of(wide.narrow(0, weight.size(0), lora.border_width));
  for_rows(lora.border_width, weight.size(1), [&](int64_t begin, int64_t end) { kernels().lora_below(lora, begin, end); });
  return at::mm_out(dx, wide_dy, wide);
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_any, const Tensor& weight, const OptionalTensor& bias,
                                       TensorList a, TensorList b, at::ArrayRef<double> scaling, IntArrayRef rows,
                                       IntArrayRef run_offsets, double dropout, const OptionalTensor& streams,
                                       const OptionalTensor& keys, int64_t x_spare, int64_t border, int64_t spare) {
  const Tensor x = with_unit_columns(x_any);
  Call call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Lora& lora = call.lora;
  Tensor u = at::empty({x.size(0), call.u_width}, x.options());
  lora.u = rows_of(u);
  const int64_t room = x.is_same(x_any) ? std::min(x_spare, border) : 0;
  const bool bordered = call.used_border <= room && x.size(0) >= ROWS_WORTH_A_BORDER;
  auto run = [&] {
    call.for_shares(x, [&](int64_t, int64_t begin, int64_t end, void* scratch) {
      kernels().lora_forward(lora, begin, end, scratch);
    });
  };
  if (!bordered) {
    Tensor y = linear(x, weight, bias, spare);
    call.pack(DOWN | UP_TRANSPOSED, x);
    lora.y = rows_of(y);
    run();
    return {y, u};
  }
  lora.border_width = std::min(room, padded_to(call.used_border, 32));
  const Tensor wide_x = widened(x, lora.border_width), wide_weight = widened(weight, lora.border_width);
  lora.x_border = rows_of(wide_x.narrow(1, x.size(1), lora.border_width));
  lora.weight_border = rows_of(wide_weight.narrow(1, x.size(1), lora.border_width));
  call.pack(DOWN, x);
  for_rows(weight.size(0), 128, [&](int64_t begin, int64_t end) { kernels().lora_border(lora, begin, end); });
  run();
  return {linear(wide_x, wide_weight, bias, spare), u};
}

std::tuple<Tensor, Tensors, Tensors> lora_linear_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& u_any, const Tensor& weight, TensorList a, TensorList b,
    at::ArrayRef<double> scaling, IntArrayRef rows, IntArrayRef run_offsets, double dropout,
    const OptionalTensor& streams, const OptionalTensor& keys, int64_t border, bool need_x) {
  const Tensor dy = with_unit_columns(dy_any), x = with_unit_columns(x_any), u = with_unit_columns(u_any);
  TORCH_CHECK(dy.scalar_type() == x.scalar_type() && u.scalar_type() == x.scalar_type(), "types of dy, x and u differ");
  Call call(x, a, b, scaling, rows, run_offsets, dropout, streams, keys);
  Lora& lora = call.lora;
  lora.u = rows_of(u);
  lora.dy = rows_of(dy);
  lora.dy_width = dy.size(1);
  Tensor dx = at::empty({need_x ? x.size(0) : 0, x.size(1)}, dy.options()), wide_dy;
  const bool bordered = need_x && !lora.dropped && call.used_border <= border && x.size(0) >= ROWS_WORTH_A_BORDER;
  if (bordered) {
    lora.border_width = std::min(border, padded_to(call.used_border, 32));
    wide_dy = room_beside(dy) >= lora.border_width ? widened(dy, lora.border_width)
                                                   : empty_with_spare(dy.size(0), dy.size(1) + lora.border_width, 0, dy);
    if (wide_dy.data_ptr() != dy.data_ptr()) lora.dy_copy = rows_of(wide_dy);
    lora.dy_border = rows_of(wide_dy.narrow(1, dy.size(1), lora.border_width));
  } else if (need_x) {
    lora.dx = rows_of(dx);
  }
  call.pack(need_x && !bordered ? UP | DOWN_ROWS : UP, x);
  const Tensor sums = at::zeros({call.threads(), call.gradient_size}, x.options().dtype(at::kFloat));
  call.for_shares(x, [&](int64_t thread, int64_t begin, int64_t end, void* scratch) {
    kernels().lora_backward(lora, begin, end, sums.data_ptr<float>() + thread * call.gradient_size, scratch);
  });
  if (bordered)
    dx = product_with_border(lora, wide_dy, weight, dx);
  else if (need_x)
    at::addmm_out(dx, dx, dy, weight);
  const LoraSums parts{sums.data_ptr<float>(), call.gradient_size, call.threads()};
  Tensors da, db;
  for (const Tensor& factor : a) da.push_back(at::empty(factor.sizes(), factor.options()));
  for (const Tensor& factor : b) db.push_back(at::empty(factor.sizes(), factor.options()));
  at::parallel_for(0, static_cast<int64_t>(call.terms.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m = t / lora.num_runs, j = t % lora.num_runs;
      kernels().lora_finish(lora, parts, call.terms[t], da[m].data_ptr<float>() + j * da[m].stride(0),
                            db[m].data_ptr<float>() + j * db[m].stride(0));
    }
  });
  return {need_x ? dx : at::empty({0}, dy.options()), da, db};
}

}  // namespace peftdyno
