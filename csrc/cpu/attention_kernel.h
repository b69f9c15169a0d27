// Blocked attention with an online softmax (Dao 2023), forward; equations in kernels/attention.py.
//
// Scores are held with keys down and queries across: maxima, sums and rescalings of a query then go lane by lane, and
// keys and values are operands as they lie in memory.
#pragma once

#include "attention_rows.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

template <class E>
struct ForwardBuffers {
  E *q, *q_right, *p, *keys;
  float *s, *o, *top, *total, *rescale;
  int32_t* positions;

  ForwardBuffers(Scratch scratch, int64_t rows, int64_t width) {
    q = scratch.take<E>(rows * width);
    q_right = scratch.take<E>(rows * width);
    p = scratch.take<E>(rows * KEY_BLOCK);
    keys = scratch.take<E>(KEY_BLOCK * width);
    s = scratch.take<float>(rows * (width > KEY_BLOCK ? width : KEY_BLOCK));
    o = scratch.take<float>(rows * width);
    top = scratch.take<float>(rows);
    total = scratch.take<float>(rows);
    rescale = scratch.take<float>(rows);
    positions = scratch.take<int32_t>(rows);
  }
};

// Prepares LANES columns of scores in place where they need it; gives their maximum.
template <class Kind>
PEFTDYNO_INLINE Vec prepare_scores(const Attention& a, float* s, int64_t rows, int64_t count, int64_t first,
                                   const int32_t* positions) {
  const Vec nothing = broadcast(-__builtin_inff());
  Vec best[2] = {nothing, nothing};
  for (int64_t k = 0; k < count; ++k) {
    Vec v = prepared<Kind>(a, load(s + k * rows));
    if (Kind::masked) v = select(seen(a, positions, first + k), v, nothing);
    if (Kind::masked || Kind::capped) store(s + k * rows, v);
    best[k % 2] = maximum(v, best[k % 2]);
  }
  return maximum(best[0], best[1]);
}

// Turns LANES columns of scores into probabilities against the running maximum, as a right operand.
template <class Engine, class Kind>
PEFTDYNO_INLINE void softmax_columns(const Attention& a, const ForwardBuffers<typename Engine::Element>& b, int64_t rows,
                                     int64_t column, const KeyBlock& block, int64_t first) {
  const Vec nothing = broadcast(-__builtin_inff());
  const float factor = score_factor(a);
  float* s = b.s + column;
  const Vec best = prepare_scores<Kind>(a, s, rows, block.count, first, b.positions + column) * factor;
  const Vec before = load(b.top + column), top = maximum(best, before);
  const Vec base = select(top == nothing, Vec{}, top);
  auto probability = [&](int64_t k) {
    const Vec x = load(s + k * rows) * factor - base;
    return Kind::masked ? select(x < -126.0f, Vec{}, exp2(x)) : exp2(x);
  };
  Vec sum[2] = {};
  int64_t k = 0;
  for (; k + 1 < block.count; k += 2) {
    const Vec even = probability(k), odd = probability(k + 1);
    sum[0] += even;
    sum[1] += odd;
    Engine::store_pair(b.p, nullptr, rows, k, column, even, odd);
  }
  if (k < block.count) {
    const Vec last = probability(k);
    sum[0] += last;
    Engine::store_pair(b.p, nullptr, rows, k, column, last, Vec{});
    k += 2;
  }
  for (; k < block.padded; k += 2) Engine::store_pair(b.p, nullptr, rows, k, column, Vec{}, Vec{});
  const Vec rescale = exp2(before - base);
  store(b.rescale + column, rescale);
  store(b.total + column, load(b.total + column) * rescale + (sum[0] + sum[1]));
  store(b.top + column, top);
}

static void rescale_output(const float* factors, int64_t rows, int64_t width, float* o) {
  bool needed = false;
  for (int64_t r = 0; r < rows; ++r) needed |= factors[r] != 1.0f;
  if (!needed) return;
  for (int64_t i = 0; i < width; ++i)
    for (int64_t r = 0; r < rows; r += LANES) store(o + i * rows + r, load(o + i * rows + r) * load(factors + r));
}

template <class T>
static void finish_forward(const Attention& a, const QueryTask& task, int64_t rows,
                           const ForwardBuffers<typename EngineOf<T>::type::Element>& b) {
  for (int64_t r = 0; r < rows; r += LANES) store(b.rescale + r, 1.0f / load(b.total + r));
  for (int64_t i = 0; i < a.padded_width; ++i)
    for (int64_t r = 0; r < rows; r += LANES)
      store(b.o + i * rows + r, load(b.o + i * rows + r) * load(b.rescale + r));
  scatter_columns<T>(b.o, rows, a.out, a.width, a, task, b.s);
  for (int64_t i = 0, r = 0; i < task.count; ++i)
    for (int64_t g = 0; g < a.groups; ++g, ++r)
      *log_sum(a, task, i, g) = b.top[r] / LOG2_E + __builtin_logf(b.total[r]);
}

template <class T>
static void forward_task(const Attention& a, const QueryTask& task, Scratch scratch) {
  using Engine = typename EngineOf<T>::type;
  using E = typename Engine::Element;
  const int64_t d = a.padded_width, rows = padded_to(task.count * a.groups, 16);
  const ForwardBuffers<E> b(scratch, rows, d);
  gather_rows<E, T>(a.q, a.q_head_stride, a, task, rows, b.q);
  Engine::right_transposed(b.q, rows, d, b.q_right);
  row_positions(a, task, rows, b.positions);
  for (int64_t r = 0; r < rows; ++r) b.top[r] = -__builtin_inff(), b.total[r] = 0.0f;
  bool started = false;
  for (int64_t l = task.first_link; l < task.last_link; ++l)
    for (int64_t j = a.links[l].first; j < a.links[l].last; ++j) {
      const KeyBlock& block = a.blocks[j];
      const Sight view = sight(a, block, a.links[l], task);
      if (view == Sight::none) continue;
      const Left<E> keys = key_operand<E, T>(a, block, task.head, false, b.keys);
      Engine::multiply(padded_to(block.count, 16), rows, d, keys.rows, keys.stride, b.q_right, rows, b.s, rows, false);
      for_kind(view == Sight::part, a.softcap != 0.0f, [&](auto kind) {
        for (int64_t column = 0; column < rows; column += LANES)
          softmax_columns<Engine, decltype(kind)>(a, b, rows, column, block, block.row + a.links[l].shift);
      });
      if (started) rescale_output(b.rescale, rows, d, b.o);
      const int64_t at = (task.head * a.padded_keys + block.offset) * d;
      Engine::multiply(d, rows, block.padded, static_cast<E*>(a.v_transposed) + at, block.padded, b.p, rows, b.o, rows,
                       started);
      started = true;
    }
  finish_forward<T>(a, task, rows, b);
}

template <class T>
static void forward_tasks(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i) forward_task<T>(a, a.tasks[i], {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

static void attention_transpose(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? transpose_keys<bfloat16>(a, begin, end, room) : transpose_keys<float>(a, begin, end, room);
}

static void attention_forward(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  a.bf16 ? forward_tasks<bfloat16>(a, begin, end, scratch) : forward_tasks<float>(a, begin, end, scratch);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
