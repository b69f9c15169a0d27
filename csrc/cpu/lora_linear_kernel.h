// The skinny products of low-rank terms; equations in kernels/lora_linear.py. u and du go by blocks of tokens; a strip of
// columns of a gradient is summed over all tokens of its run by one thread, so no thread's sums are added to another's.
//
// Masks only zero elements: dropout's scale is part of A, and of dA at the end.
#pragma once

#include "block_rows.h"
#include "lora_plan.h"
#include "random_kernel.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

static_assert(LORA_STRIP % MASK_COLUMNS == 0, "whole draws fill a strip");

// The masks of a strip of columns for some rows, STRIP_WORDS words a row.
static void draw_strip(const Lora& a, const LoraTerm& term, int64_t row, int64_t rows, int64_t column, uint32_t* masks) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < LORA_STRIP; i += MASK_COLUMNS)
      draw_mask(static_cast<uint64_t>(a.streams[row + r]), term.key, a.threshold, column + i,
                masks + r * STRIP_WORDS + i / 32);
}

// Rows of T as a left operand [rows padded to 16, width padded to 32]: as they lie where they can be used so.
template <class E, class T>
static Left<E> left_operand(const Rows& source, int64_t row, int64_t rows, int64_t column, int64_t width,
                            const uint32_t* masks, E* block) {
  if constexpr (sizeof(E) == sizeof(T))
    if (rows % 16 == 0 && width % 32 == 0 && masks == nullptr) return {row_of<E>(source, row) + column, source.stride};
  const int64_t padded = padded_to(width, 32);
  for (int64_t r = 0; r < padded_to(rows, 16); ++r) {
    ask_for_row(row_of<T>(source, row + smaller(r, rows - 1)) + column + width, width);
    copy_row(row_of<T>(source, row + smaller(r, rows - 1)) + column, r < rows ? width : 0, padded,
             masks == nullptr ? nullptr : masks + smaller(r, rows - 1) * STRIP_WORDS, block + r * padded);
  }
  return {block, padded};
}

// Rows of T as a right operand [rows padded to 32, padded].
template <class Engine, class T>
static void right_operand(const Rows& source, int64_t row, int64_t rows, int64_t column, int64_t width,
                          const uint32_t* masks, typename Engine::Element* block) {
  const T* pointers[LORA_CHUNK];
  for (int64_t r = 0; r < rows; ++r) pointers[r] = row_of<T>(source, row + r) + column;
  Engine::pack_rows(pointers, rows, padded_to(rows, 32), width, padded_to(width, 32), block, masks, STRIP_WORDS);
}

// Rows of fp32 in the type of operands, with zeros beyond `rows` and `width`.
template <class E>
static void convert_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float scale,
                         int64_t padded_rows, int64_t padded_width, E* to) {
  for (int64_t r = 0; r < padded_rows; ++r)
    for (int64_t i = 0; i < padded_width; i += LANES) {
      ask_for(from + (r + 1) * stride + i);
      store(to + r * padded_width + i,
            r < rows && i < width ? load_upto(from + r * stride + i, width - i) * scale : Vec{});
    }
}

template <class T>
static void store_columns(const float* c, int64_t stride, const LoraTask& task, int64_t width, const Rows& target,
                          int64_t column) {
  for (int64_t r = 0; r < task.rows; ++r)
    for (int64_t i = 0; i < width; i += LANES)
      store_upto(row_of<T>(target, task.row + r) + column + i, load(c + r * stride + i), width - i);
}

// target (+)= mask (left right) for a strip of columns of some rows.
template <class Engine, class T>
static void put_product(int64_t row, int64_t rows, int64_t depth, const typename Engine::Element* left,
                        const typename Engine::Element* right, int64_t width, bool add, const uint32_t* masks,
                        const Rows& target, int64_t column, float* c) {
  const int64_t padded = padded_to(width, 32);
  for (int64_t first = 0; first < rows; first += PUT_ROWS) {
    const int64_t count = smaller(PUT_ROWS, rows - first);
    Engine::multiply(padded_to(count, 16), padded, depth, left + first * depth, depth, right, padded, c, padded, false);
    for (int64_t r = 0; r < count; ++r) {
      T* to = row_of<T>(target, row + first + r) + column;
      for (int64_t i = 0; i < width; i += LANES) {
        Vec v = load(c + r * padded + i);
        if (masks != nullptr) v = masked(v, mask_bits(masks + (first + r) * STRIP_WORDS, i));
        if (add) v += load_upto(to + i, width - i);
        store_upto(to + i, v, width - i);
      }
    }
  }
}

// u = (x mask) A^T in fp32 [rows, padded_rank].
template <class Engine, class T>
static void down_product(const Lora& a, const LoraTerm& term, const LoraTask& task, float* u, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, n = padded_to(term.rank, 16), padded_rows = padded_to(task.rows, 16);
  const E* down = static_cast<const E*>(term.down);
  if (!a.dropped && sizeof(E) == sizeof(T) && task.rows % 16 == 0 && a.width % 32 == 0)
    return Engine::multiply(task.rows, n, a.width, row_of<E>(a.x, task.row), a.x.stride, down, n, u, rank, false);
  E* block = scratch.take<E>(LORA_ROWS * LORA_STRIP);
  uint32_t* masks = a.dropped ? scratch.take<uint32_t>(LORA_ROWS * STRIP_WORDS) : nullptr;
  for (int64_t column = 0; column < a.width; column += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, a.width - column), padded = padded_to(width, 32);
    if (a.dropped) draw_strip(a, term, task.row, task.rows, column, masks);
    const Left<E> left = left_operand<E, T>(a.x, task.row, task.rows, column, width, masks, block);
    Engine::multiply(padded_rows, n, padded, left.rows, left.stride, down + column * n, n, u, rank, column > 0);
  }
}

template <class Engine, class T>
static void forward_term(const Lora& a, const LoraTerm& term, const LoraTask& task, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t rank = term.padded_rank, padded_rows = padded_to(task.rows, 32);
  float* u = scratch.take<float>(padded_rows * rank);
  down_product<Engine, T>(a, term, task, u, scratch);
  store_columns<T>(u, rank, task, term.rank, a.u, term.u_column);
  if (a.y.data == nullptr) return;
  E* left = scratch.take<E>(padded_rows * rank);
  float* c = scratch.take<float>(PUT_ROWS * LORA_STRIP);
  convert_rows<E>(u, rank, task.rows, term.rank, 1.0f, padded_rows, rank, left);
  for (int64_t column = 0; column < term.out_width; column += LORA_STRIP)
    put_product<Engine, T>(task.row, task.rows, rank, left, static_cast<const E*>(term.up_transposed) + column * rank,
                           smaller(LORA_STRIP, term.out_width - column), true, nullptr, a.y, term.out_column + column,
                           c);
}

// f(term) for every module of a task's run.
template <class Engine, class F>
static void for_terms(const Lora& a, const LoraTask& task, const F& f) {
  Engine::begin();
  for (int64_t m = 0; m < a.num_modules; ++m) f(a.terms[m * a.num_runs + task.run]);
  Engine::end();
}

template <class T>
static void forward_task(const Lora& a, const LoraTask& task, Scratch scratch) {
  using Engine = typename EngineOf<T>::type;
  for_terms<Engine>(a, task, [&](const LoraTerm& term) { forward_term<Engine, T>(a, term, task, scratch); });
}

// Where tokens of a run lie in a transposed operand of `n` rows: the chunk's start, its tokens and the first of them.
struct ChunkPlace {
  int64_t start, stride, offset;
};

PEFTDYNO_INLINE ChunkPlace place_of(const Lora& a, int64_t run, int64_t row, int64_t n) {
  const int64_t token = row - a.run_offsets[run], chunk = token / LORA_CHUNK * LORA_CHUNK;
  const int64_t all = padded_to(a.run_offsets[run + 1] - a.run_offsets[run], 32);
  return {chunk * n, smaller(LORA_CHUNK, all - chunk), token - chunk};
}

// fp32 [rows, n] to a task's place in a transposed operand.
template <class E>
static void put_transposed(const Lora& a, const LoraTask& task, const float* from, int64_t rows, int64_t n,
                           float* columns, E* operand) {
  transpose_words(from, rows, n, n, columns);
  const ChunkPlace place = place_of(a, task.run, task.row, n);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < rows; i += LANES)
      store(operand + place.start + r * place.stride + place.offset + i, load(columns + r * rows + i));
}

// du = s dy B of a task's tokens, and both it and u transposed.
template <class Engine, class T>
static void output_gradients(const Lora& a, const LoraTerm& term, const LoraTask& task, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t n = padded_to(term.rank, 16), rows = padded_to(task.rows, 32);
  float *values = scratch.take<float>(rows * n), *columns = scratch.take<float>(rows * n);
  E* block = scratch.take<E>(rows * LORA_STRIP);
  for (int64_t column = 0; column < term.out_width; column += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, term.out_width - column), padded = padded_to(width, 32);
    const Left<E> left =
        left_operand<E, T>(a.dy, task.row, task.rows, term.out_column + column, width, nullptr, block);
    Engine::multiply(padded_to(task.rows, 16), n, padded, left.rows, left.stride,
                     static_cast<const E*>(term.up) + column * n, n, values, n, column > 0);
  }
  for (int64_t i = task.rows * n; i < rows * n; i += LANES) store(values + i, Vec{});
  convert_rows<E>(values, n, task.rows, term.rank, 1.0f, task.rows, term.padded_rank,
                  static_cast<E*>(term.du) + task.row * term.padded_rank);
  put_transposed<E>(a, task, values, rows, n, columns, static_cast<E*>(term.du_transposed));
  for (int64_t r = 0; r < rows; ++r)
    copy_row(row_of<T>(a.u, task.row + smaller(r, task.rows - 1)) + term.u_column, r < task.rows ? term.rank : 0, n,
             nullptr, values + r * n);
  put_transposed<E>(a, task, values, rows, n, columns, static_cast<E*>(term.u_transposed));
}

template <class T>
static void gradients_task(const Lora& a, const LoraTask& task, Scratch scratch) {
  using Engine = typename EngineOf<T>::type;
  for_terms<Engine>(a, task, [&](const LoraTerm& term) { output_gradients<Engine, T>(a, term, task, scratch); });
}

// sums (+)= transposed block, for the tokens of one chunk.
template <class Engine>
static void add_chunk(const Lora& a, int64_t run, int64_t row, int64_t n, const void* transposed,
                      const typename Engine::Element* block, int64_t padded, float* sums) {
  const ChunkPlace place = place_of(a, run, row, n);
  Engine::multiply(n, padded, place.stride, static_cast<const typename Engine::Element*>(transposed) + place.start,
                   place.stride, block, padded, sums, padded, place.start > 0);
}

// Columns of dA of every module of a run, and of mask (du A) where dx is wanted here.
template <class Engine, class T>
static void down_strip(const Lora& a, const LoraStrip& strip, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t column = strip.column, width = smaller(LORA_STRIP, a.width - column), padded = padded_to(width, 32);
  const int64_t first = a.run_offsets[strip.run], last = a.run_offsets[strip.run + 1];
  uint32_t* own_masks = scratch.take<uint32_t>(LORA_CHUNK * STRIP_WORDS);
  E* block = scratch.take<E>(LORA_CHUNK * LORA_STRIP);
  float* c = scratch.take<float>(PUT_ROWS * LORA_STRIP);
  float* sums = scratch.take<float>(0);
  for (int64_t row = first; row < last; row += LORA_CHUNK) {
    const int64_t rows = smaller(LORA_CHUNK, last - row);
    float* next = sums;
    for (int64_t m = 0; m < a.num_modules; ++m) {
      const LoraTerm& term = a.terms[m * a.num_runs + strip.run];
      const int64_t n = padded_to(term.rank, 16);
      uint32_t* masks = nullptr;
      if (a.dropped) {
        masks = term.masks == nullptr ? own_masks : term.masks + (column / LORA_STRIP * a.num_tokens + row) * STRIP_WORDS;
        draw_strip(a, term, row, rows, column, masks);
      }
      if (a.dropped || m == 0) right_operand<Engine, T>(a.x, row, rows, column, width, masks, block);
      add_chunk<Engine>(a, strip.run, row, n, term.du_transposed, block, padded, next);
      if (a.dx.data != nullptr)
        put_product<Engine, T>(row, rows, term.padded_rank, static_cast<const E*>(term.du) + row * term.padded_rank,
                               static_cast<const E*>(term.down_rows) + column * term.padded_rank, width, m > 0, masks,
                               a.dx, column, c);
      next += n * padded;
    }
  }
  for (int64_t m = 0; m < a.num_modules; ++m) {
    const LoraTerm& term = a.terms[m * a.num_runs + strip.run];
    for (int64_t r = 0; r < term.rank; ++r)
      for (int64_t i = 0; i < width; i += LANES)
        store_upto(term.da + r * a.width + column + i,
                   first == last ? Vec{} : load(sums + r * padded + i) * a.keep_scale, width - i);
    sums += padded_to(term.rank, 16) * padded;
  }
}

// Rows of dB of one module of a run: columns of dB^T.
template <class Engine, class T>
static void up_strip(const Lora& a, const LoraStrip& strip, Scratch scratch) {
  using E = typename Engine::Element;
  const LoraTerm& term = a.terms[strip.module * a.num_runs + strip.run];
  const int64_t width = smaller(LORA_STRIP, term.out_width - strip.column), padded = padded_to(width, 32);
  const int64_t n = padded_to(term.rank, 16), first = a.run_offsets[strip.run], last = a.run_offsets[strip.run + 1];
  E* block = scratch.take<E>(LORA_CHUNK * LORA_STRIP);
  float *sums = scratch.take<float>(n * LORA_STRIP), *rows_of_db = scratch.take<float>(n * LORA_STRIP);
  for (int64_t row = first; row < last; row += LORA_CHUNK) {
    right_operand<Engine, T>(a.dy, row, smaller(LORA_CHUNK, last - row), term.out_column + strip.column, width, nullptr,
                             block);
    add_chunk<Engine>(a, strip.run, row, n, term.u_transposed, block, padded, sums);
  }
  for (int64_t i = 0; first == last && i < n * padded; i += LANES) store(sums + i, Vec{});
  transpose_words(sums, n, padded, padded, rows_of_db);
  for (int64_t o = 0; o < width; ++o)
    for (int64_t i = 0; i < term.rank; i += LANES)
      store_upto(term.db + (strip.column + o) * term.rank + i, load(rows_of_db + o * n + i) * term.up_scale,
                 term.rank - i);
}

template <class T>
static void gradients_strip(const Lora& a, const LoraStrip& strip, Scratch scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  strip.module < 0 ? down_strip<Engine, T>(a, strip, scratch) : up_strip<Engine, T>(a, strip, scratch);
  Engine::end();
}

template <class Engine>
static void pack_down(const Lora& a, const LoraTerm& term, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t r = term.rank, rank = term.padded_rank, n = padded_to(r, 16), in = padded_to(a.width, 32);
  E* factor = scratch.take<E>(rank * in);
  const E** rows = scratch.take<const E*>(rank);
  convert_rows<E>(term.a, a.width, r, a.width, a.keep_scale, rank, in, factor);
  if (term.down != nullptr) Engine::right_transposed(factor, n, in, static_cast<E*>(term.down));
  for (int64_t c = 0; term.down_rows != nullptr && c < in; c += LORA_STRIP) {
    const int64_t width = smaller(LORA_STRIP, in - c);
    for (int64_t i = 0; i < rank; ++i) rows[i] = factor + i * in + c;
    Engine::pack_rows(rows, rank, rank, width, width, static_cast<E*>(term.down_rows) + c * rank);
  }
}

template <class Engine>
static void pack_up(const LoraTerm& term, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t r = term.rank, rank = term.padded_rank, n = padded_to(r, 16), out = padded_to(term.out_width, 32);
  E* factor = scratch.take<E>(rank * out);
  if (term.up != nullptr) {
    convert_rows<E>(term.b, r, term.out_width, r, term.up_scale, out, n, factor);
    Engine::right(factor, out, n, static_cast<E*>(term.up));
  }
  if (term.up_transposed == nullptr) return;
  convert_rows<E>(term.b, r, term.out_width, r, term.up_scale, out, rank, factor);
  for (int64_t c = 0; c < out; c += LORA_STRIP)
    Engine::right_transposed(factor + c * rank, smaller(LORA_STRIP, out - c), rank,
                             static_cast<E*>(term.up_transposed) + c * rank);
}

template <class Engine>
static void pack_factor(const Lora& a, const LoraTerm& term, bool up, Scratch scratch) {
  up ? pack_up<Engine>(term, scratch) : pack_down<Engine>(a, term, scratch);
}

static void lora_pack(const Lora& a, const LoraTerm& term, bool up, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? pack_factor<EngineOf<bfloat16>::type>(a, term, up, room)
         : pack_factor<EngineOf<float>::type>(a, term, up, room);
}

static void lora_forward(const Lora& a, const LoraTask& task, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? forward_task<bfloat16>(a, task, room) : forward_task<float>(a, task, room);
}

static void lora_output_gradients(const Lora& a, const LoraTask& task, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? gradients_task<bfloat16>(a, task, room) : gradients_task<float>(a, task, room);
}

static void lora_strip(const Lora& a, const LoraStrip& strip, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? gradients_strip<bfloat16>(a, strip, room) : gradients_strip<float>(a, strip, room);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
