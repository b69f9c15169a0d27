// The skinny products of low-rank terms on blocks of tokens, with dropout's mask drawn on the way; equations in
// kernels/lora_linear.py. The masks only zero elements: their scale is part of A, and of dA at the end.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "random_kernel.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

static_assert(LORA_STRIP % MASK_COLUMNS == 0, "whole draws fill a strip");

static void draw_strip(const Lora& a, const LoraTerm& term, const LoraTask& task, int64_t column, uint16_t* masks) {
  for (int64_t r = 0; r < task.rows; ++r)
    for (int64_t i = 0; i < LORA_STRIP; i += MASK_COLUMNS)
      draw_masks(static_cast<uint64_t>(a.streams[task.row + r]), term.key, a.threshold, column + i,
                 masks + r * LORA_STRIP + i);
}

// Rows of T as a left operand [rows padded to 16, width padded to 32]: as they lie where they can be used so.
template <class E, class T>
static Left<E> left_operand(const Rows& source, int64_t row, int64_t rows, int64_t column, int64_t width, E* block) {
  if constexpr (sizeof(E) == sizeof(T))
    if (rows % 16 == 0 && width % 32 == 0) return {row_of<E>(source, row) + column, source.stride};
  const int64_t padded = padded_to(width, 32);
  for (int64_t r = 0; r < padded_to(rows, 16); ++r)
    copy_row(row_of<T>(source, row + smaller(r, rows - 1)) + column, r < rows ? width : 0, padded, nullptr,
             block + r * padded);
  return {block, padded};
}

// Rows of T as a right operand [rows padded to 32, padded].
template <class Engine, class T>
static void right_operand(const Rows& source, int64_t row, int64_t rows, int64_t column, int64_t width,
                          const uint16_t* masks, typename Engine::Element* block) {
  const T* pointers[LORA_ROWS];
  for (int64_t r = 0; r < rows; ++r) pointers[r] = row_of<T>(source, row + r) + column;
  Engine::pack_rows(pointers, rows, padded_to(rows, 32), width, padded_to(width, 32), block, masks, LORA_STRIP);
}

// Rows of fp32 as a left operand of `columns` columns, and transposed; rows beyond are zero.
template <class E>
static void operand_block(const float* c, int64_t rows, int64_t padded_rows, int64_t columns, E* block, E* transposed) {
  for (int64_t r = 0; r < padded_rows; ++r)
    for (int64_t i = 0; i < columns; i += LANES) {
      E* to = block + r * columns + i;
      store(to, r < rows ? load(c + r * columns + i) : Vec{});
      if (transposed == nullptr) continue;
      for (int64_t lane = 0; lane < LANES; ++lane) transposed[(i + lane) * padded_rows + r] = to[lane];
    }
}

template <class T>
static void store_columns(const float* c, int64_t stride, const LoraTask& task, int64_t width, const Rows& target,
                          int64_t column) {
  for (int64_t r = 0; r < task.rows; ++r)
    for (int64_t i = 0; i < width; i += LANES)
      store_upto(row_of<T>(target, task.row + r) + column + i, load(c + r * stride + i), width - i);
}

// Writes fp32 rows to rows of T or, with `add`, adds them; with `masks` only where they let it.
template <class T>
static void put_block(const float* c, int64_t stride, int64_t row, int64_t rows, int64_t width, bool add,
                      const uint16_t* masks, const Rows& target, int64_t column) {
  for (int64_t r = 0; r < rows; ++r) {
    T* to = row_of<T>(target, row + r) + column;
    for (int64_t i = 0; i < width; i += LANES) {
      Vec v = load(c + r * stride + i);
      if (masks != nullptr && !add && i + LANES <= width) {
        store_masked(to + i, v, masks + r * LORA_STRIP + i);
        continue;
      }
      if (masks != nullptr) v = masked(v, masks + r * LORA_STRIP + i);
      if (add) v += load_upto(to + i, width - i);
      store_upto(to + i, v, width - i);
    }
  }
}

constexpr int64_t PUT_ROWS = 32;  // rows of fp32 results held in the first-level cache

// target (+)= mask (left * right) for one strip of columns of a task's rows.
template <class Engine, class T>
static void put_product(const LoraTask& task, int64_t depth, const typename Engine::Element* left,
                        const typename Engine::Element* right, int64_t width, bool add, const uint16_t* masks,
                        const Rows& target, int64_t column, float* c) {
  const int64_t padded = padded_to(width, 32);
  for (int64_t r = 0; r < task.rows; r += PUT_ROWS) {
    const int64_t rows = smaller(PUT_ROWS, task.rows - r);
    Engine::multiply(padded_to(rows, 16), padded, depth, left + r * depth, depth, right, padded, c, padded, false);
    put_block<T>(c, padded, task.row + r, rows, width, add, masks == nullptr ? nullptr : masks + r * LORA_STRIP, target,
                 column);
  }
}

// u = (x mask) A^T in fp32 [rows, padded_rank].
template <class Engine, class T>
static void down_product(const Lora& a, const LoraTerm& term, const LoraTask& task, float* u, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, n = padded_to(term.rank, 16), k = padded_to(a.width, 32);
  E* block = scratch.take<E>(16 * padded_to(a.width, LORA_STRIP));
  const E* down = static_cast<const E*>(term.down);
  for (int64_t first = 0; first < task.rows; first += 16) {
    const int64_t rows = smaller(16, task.rows - first), row = task.row + first;
    if (!a.dropped) {
      const Left<E> left = left_operand<E, T>(a.x, row, rows, 0, a.width, block);
      Engine::multiply(16, n, k, left.rows, left.stride, down, n, u + first * rank, rank, false);
      continue;
    }
    const int64_t stride = padded_to(a.width, LORA_STRIP);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t column = 0; column < a.width; column += MASK_COLUMNS) {
        uint16_t masks[MASK_COLUMNS];
        draw_masks(static_cast<uint64_t>(a.streams[row + r]), term.key, a.threshold, column, masks);
        copy_row(row_of<T>(a.x, row + r) + column, smaller(MASK_COLUMNS, a.width - column), MASK_COLUMNS, masks,
                 block + r * stride + column);
      }
    for (int64_t i = 0; i < (16 - rows) * stride; i += LANES) store(block + rows * stride + i, Vec{});
    Engine::multiply(16, n, k, block, stride, down, n, u + first * rank, rank, false);
  }
}

template <class Engine, class T>
static void forward_term(const Lora& a, const LoraTerm& term, const LoraTask& task, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, padded_rows = padded_to(task.rows, 32);
  float* u = scratch.take<float>(padded_rows * rank);
  if (padded_to(term.rank, 16) < rank)
    for (int64_t i = 0; i < padded_rows * rank; i += LANES) store(u + i, Vec{});
  down_product<Engine, T>(a, term, task, u, scratch);
  store_columns<T>(u, rank, task, term.rank, a.u, term.u_column);
  if (a.y.data == nullptr) return;
  E* left = scratch.take<E>(padded_rows * rank);
  float* c = scratch.take<float>(PUT_ROWS * LORA_STRIP);
  operand_block<E>(u, task.rows, padded_rows, rank, left, nullptr);
  for (int64_t column = 0; column < term.out_width; column += LORA_STRIP)
    put_product<Engine, T>(task, rank, left, static_cast<const E*>(term.up_transposed) + column * rank,
                           smaller(LORA_STRIP, term.out_width - column), true, nullptr, a.y, term.out_column + column,
                           c);
}

template <class T>
static void forward_task(const Lora& a, const LoraTask& task, Scratch scratch) {
  for (int64_t m = 0; m < a.num_modules; ++m)
    forward_term<typename EngineOf<T>::type, T>(a, a.terms[m * a.num_runs + task.run], task, scratch);
}

// du = s dy B in fp32, and dB^T += u^T dy.
template <class Engine, class T>
static void output_gradients(const Lora& a, const LoraTerm& term, const LoraTask& task, float* du, float* db,
                             Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, n = padded_to(term.rank, 16);
  const int64_t padded_rows = padded_to(task.rows, 32);
  E *u_transposed = scratch.take<E>(padded_rows * rank), *block = scratch.take<E>(padded_rows * LORA_STRIP);
  for (int64_t i = 0; i < padded_rows * rank; i += LANES) store(u_transposed + i, Vec{});
  for (int64_t r = 0; r < task.rows; ++r)
    for (int64_t i = 0; i < rank; i += LANES) {
      E lanes[LANES];
      copy_row(row_of<T>(a.u, task.row + r) + term.u_column + i, term.rank - i, LANES, nullptr, lanes);
      for (int64_t lane = 0; lane < LANES; ++lane) u_transposed[(i + lane) * padded_rows + r] = lanes[lane];
    }
  for (int64_t column = 0; column < term.out_width; column += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, term.out_width - column), padded = padded_to(width, 32);
    const Left<E> left = left_operand<E, T>(a.dy, task.row, task.rows, term.out_column + column, width, block);
    Engine::multiply(padded_to(task.rows, 16), n, padded, left.rows, left.stride,
                     static_cast<const E*>(term.up) + column * n, n, du, rank, column > 0);
    right_operand<Engine, T>(a.dy, task.row, task.rows, term.out_column + column, width, nullptr, block);
    Engine::multiply(n, padded, padded_rows, u_transposed, padded_rows, block, padded, db + column * n, padded, true);
  }
}

// What the strips of x need of one module.
template <class E>
struct DownGradient {
  const E *left, *transposed;  // du and its transpose
  float* da;
};

// dA += du^T (x mask) and, where wanted, dx (+)= mask (du A), for one strip of columns.
template <class Engine, class T>
static void input_strip(const Lora& a, const LoraTerm& term, const LoraTask& task,
                        const DownGradient<typename Engine::Element>& d, int64_t column, bool add, uint16_t* masks,
                        typename Engine::Element* block, float* c) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, padded_rows = padded_to(task.rows, 32);
  const int64_t width = smaller(LORA_STRIP, a.width - column), padded = padded_to(width, 32);
  if (a.dropped) draw_strip(a, term, task, column, masks);
  const uint16_t* mine = a.dropped ? masks : nullptr;
  right_operand<Engine, T>(a.x, task.row, task.rows, column, width, mine, block);
  const int64_t n = padded_to(term.rank, 16);
  Engine::multiply(n, padded, padded_rows, d.transposed, padded_rows, block, padded, d.da + column * n, padded, true);
  if (a.dx.data != nullptr)
    put_product<Engine, T>(task, rank, d.left, static_cast<const E*>(term.down_rows) + column * rank, width, add, mine,
                           a.dx, column, c);
}

template <class Engine, class T>
static void backward_term(const Lora& a, const LoraTerm& term, const LoraTask& task, bool first, float* gradients,
                          Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, padded_rows = padded_to(task.rows, 32);
  float *du = scratch.take<float>(padded_rows * rank), *da = gradients + term.gradient;
  for (int64_t i = 0; i < padded_rows * rank; i += LANES) store(du + i, Vec{});
  output_gradients<Engine, T>(a, term, task, du, da + padded_to(term.rank, 16) * padded_to(a.width, 32), scratch);
  uint16_t* masks = a.dropped ? scratch.take<uint16_t>(padded_rows * LORA_STRIP) : nullptr;
  E *left = scratch.take<E>(padded_rows * rank), *transposed = scratch.take<E>(padded_rows * rank);
  E* block = scratch.take<E>(padded_rows * LORA_STRIP);
  float* c = scratch.take<float>(PUT_ROWS * LORA_STRIP);
  operand_block<E>(du, task.rows, padded_rows, rank, left, transposed);
  const DownGradient<E> d{left, transposed, da};
  for (int64_t column = 0; column < a.width; column += LORA_STRIP)
    input_strip<Engine, T>(a, term, task, d, column, !first, masks, block, c);
}

template <class T>
static void backward_task(const Lora& a, const LoraTask& task, float* gradients, Scratch scratch) {
  for (int64_t m = 0; m < a.num_modules; ++m)
    backward_term<typename EngineOf<T>::type, T>(a, a.terms[m * a.num_runs + task.run], task, m == 0, gradients,
                                                 scratch);
}

// A factor [rows, columns] times a scale, in the engine's type.
template <class E>
static void convert_factor(const float* factor, int64_t size, float scale, E* to) {
  for (int64_t i = 0; i < size; i += LANES) store_upto(to + i, load_upto(factor + i, size - i) * scale, size - i);
}

// Packs rows first to first + count - 1 of a converted factor, columns from `column` on, as a right operand.
template <class Engine, class E>
static void pack_factor(const E* factor, int64_t stride, int64_t first, int64_t count, int64_t padded_count,
                        int64_t column, int64_t width, int64_t padded_width, bool transposed, const E** rows, E* to) {
  for (int64_t r = 0; r < count; ++r) rows[r] = factor + (first + r) * stride + column;
  if (transposed)
    Engine::pack_transposed(rows, count, padded_count, width, padded_width, to);
  else
    Engine::pack_rows(rows, count, padded_count, width, padded_width, to);
}

template <class Engine>
static void pack_down(const Lora& a, const LoraTerm& term, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t r = term.rank, rank = term.padded_rank, n = padded_to(r, 16), in = a.width;
  E* factor = scratch.take<E>(r * in);
  const E** rows = scratch.take<const E*>(r);
  convert_factor(term.a, r * in, a.keep_scale, factor);
  if (term.down != nullptr)
    pack_factor<Engine>(factor, in, 0, r, n, 0, in, padded_to(in, 32), true, rows, static_cast<E*>(term.down));
  for (int64_t c = 0; term.down_rows != nullptr && c < in; c += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, in - c);
    pack_factor<Engine>(factor, in, 0, r, rank, c, width, padded_to(width, 32), false, rows,
                        static_cast<E*>(term.down_rows) + c * rank);
  }
}

template <class Engine>
static void pack_up(const LoraTerm& term, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t r = term.rank, rank = term.padded_rank, n = padded_to(r, 16), out = term.out_width;
  E* factor = scratch.take<E>(r * out);
  const E** rows = scratch.take<const E*>(out);
  convert_factor(term.b, r * out, term.up_scale, factor);
  if (term.up != nullptr)
    pack_factor<Engine>(factor, r, 0, out, padded_to(out, 32), 0, r, n, false, rows, static_cast<E*>(term.up));
  for (int64_t c = 0; term.up_transposed != nullptr && c < out; c += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, out - c);
    pack_factor<Engine>(factor, r, c, width, padded_to(width, 32), 0, r, rank, true, rows,
                        static_cast<E*>(term.up_transposed) + c * rank);
  }
}

// One thread's sums of a factor [rank, columns], strip after strip, added to those of the others.
PEFTDYNO_INLINE float gradient_sum(const LoraSums& sums, int64_t at) {
  float total = 0.0f;
  for (int64_t t = 0; t < sums.num_threads; ++t) total += sums.values[t * sums.size + at];
  return total;
}

// Where element (r, column) of such sums lies.
PEFTDYNO_INLINE int64_t strip_position(int64_t rank16, int64_t columns, int64_t r, int64_t column) {
  const int64_t strip = column / LORA_STRIP * LORA_STRIP;
  return strip * rank16 + r * padded_to(smaller(LORA_STRIP, columns - strip), 32) + column - strip;
}

static void lora_finish(const Lora& a, const LoraSums& sums, const LoraTerm& term, float* da, float* db) {
  const int64_t n = padded_to(term.rank, 16), b_start = term.gradient + n * padded_to(a.width, 32);
  for (int64_t r = 0; r < term.rank; ++r)
    for (int64_t strip = 0; strip < a.width; strip += LORA_STRIP) {
      const int64_t at = term.gradient + strip_position(n, a.width, r, strip);
      for (int64_t i = 0; i < smaller(LORA_STRIP, a.width - strip); i += LANES) {
        const int64_t left = smaller(LORA_STRIP, a.width - strip) - i;
        Vec total = {};
        for (int64_t t = 0; t < sums.num_threads; ++t) total += load(sums.values + t * sums.size + at + i);
        store_upto(da + r * a.width + strip + i, total * a.keep_scale, left);
      }
    }
  for (int64_t o = 0; o < term.out_width; ++o)
    for (int64_t r = 0; r < term.rank; ++r)
      db[o * term.rank + r] =
          gradient_sum(sums, b_start + strip_position(n, term.out_width, r, o)) * term.up_scale;
}

template <class T>
static void forward_all(const Lora& a, int64_t begin, int64_t end, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i) forward_task<T>(a, a.tasks[i], {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

template <class T>
static void backward_all(const Lora& a, int64_t begin, int64_t end, float* gradients, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i) backward_task<T>(a, a.tasks[i], gradients, {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

template <class Engine>
static void pack_factor_of(const Lora& a, const LoraTerm& term, bool up, Scratch scratch) {
  up ? pack_up<Engine>(term, scratch) : pack_down<Engine>(a, term, scratch);
}

static void lora_pack(const Lora& a, const LoraTerm& term, bool up, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? pack_factor_of<EngineOf<bfloat16>::type>(a, term, up, room)
         : pack_factor_of<EngineOf<float>::type>(a, term, up, room);
}

static void lora_forward(const Lora& a, int64_t begin, int64_t end, void* scratch) {
  a.bf16 ? forward_all<bfloat16>(a, begin, end, scratch) : forward_all<float>(a, begin, end, scratch);
}

static void lora_backward(const Lora& a, int64_t begin, int64_t end, float* gradients, void* scratch) {
  a.bf16 ? backward_all<bfloat16>(a, begin, end, gradients, scratch)
         : backward_all<float>(a, begin, end, gradients, scratch);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
