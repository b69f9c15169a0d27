// Blocked attention, backward: scores and probabilities again from q, k and the saved log-sums; see
// attention_kernel.h for how they lie and kernels/attention.py for the equations.
#pragma once

#include "attention_rows.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

template <class E>
struct BackwardBuffers {
  E *rows, *q_right, *q_transposed, *dout_right, *dout_transposed;  // right operands [rows, width] and [width, rows]
  E *p, *ds, *ds_right, *keys;                                      // [keys, rows] as left operands; dS also as right
  float *s, *dp, *dq, *lse, *d;
  int32_t* positions;

  BackwardBuffers(Scratch scratch, int64_t num_rows, int64_t width) {
    E** wide[] = {&rows, &q_right, &q_transposed, &dout_right, &dout_transposed};
    E** narrow[] = {&p, &ds, &ds_right};
    for (E** operand : wide) *operand = scratch.take<E>(num_rows * width);
    for (E** operand : narrow) *operand = scratch.take<E>(num_rows * KEY_BLOCK);
    keys = scratch.take<E>(KEY_BLOCK * width);
    s = scratch.take<float>(num_rows * (width > KEY_BLOCK ? width : KEY_BLOCK));
    dp = scratch.take<float>(num_rows * KEY_BLOCK);
    dq = scratch.take<float>(num_rows * width);
    lse = scratch.take<float>(num_rows);
    d = scratch.take<float>(num_rows);
    positions = scratch.take<int32_t>(num_rows);
  }
};

template <class T>
static void load_task(const Attention& a, const QueryTask& task, int64_t rows,
                      const BackwardBuffers<typename EngineOf<T>::type::Element>& b) {
  using Engine = typename EngineOf<T>::type;
  using E = typename Engine::Element;
  gather_rows<E, T>(a.q, a.q_head_stride, a, task, rows, b.rows);
  Engine::right(b.rows, rows, a.padded_width, b.q_right);
  Engine::right_transposed(b.rows, rows, a.padded_width, b.q_transposed);
  gather_rows<E, T>(a.dout, a.width, a, task, rows, b.rows);
  Engine::right(b.rows, rows, a.padded_width, b.dout_right);
  Engine::right_transposed(b.rows, rows, a.padded_width, b.dout_transposed);
  row_positions(a, task, rows, b.positions);
  for (int64_t r = 0; r < rows; ++r) b.d[r] = 0.0f, b.lse[r] = 1e30f;  // of padding: probability 0
  for (int64_t i = 0, r = 0; i < task.count; ++i)
    for (int64_t g = 0; g < a.groups; ++g, ++r) {
      const T *o = task_row<T>(a.out, a.width, a, task, i, g), *grad = task_row<T>(a.dout, a.width, a, task, i, g);
      ask_for_row(task_row<T>(a.out, a.width, a, task, smaller(i + ROWS_AHEAD, task.count - 1), g), a.width);
      Vec products = {};
      for (int64_t c = 0; c < a.width; c += LANES)
        products += load_upto(o + c, a.width - c) * load_upto(grad + c, a.width - c);
      b.d[r] = sum(products);
      b.lse[r] = LOG2_E * *log_sum(a, task, i, g);
    }
}

struct ProbabilityAndGradient {
  Vec p, ds;
};

// P and dS of LANES columns: as left operands for dV and dK, dS also as a right operand for dQ.
template <class Engine, class Kind>
PEFTDYNO_INLINE void gradient_columns(const Attention& a, const BackwardBuffers<typename Engine::Element>& b,
                                      int64_t rows, int64_t column, const KeyBlock& block, int64_t first) {
  const float factor = score_factor(a), scale = a.scale, inverse_cap = Kind::capped ? 1.0f / a.softcap : 0.0f;
  const Vec lse = load(b.lse + column), d = load(b.d + column);
  auto at = [&](int64_t k) {
    const Vec s = prepared<Kind>(a, load(b.s + k * rows + column));
    Vec p = exp2(s * factor - lse);
    if (Kind::masked) p = select(seen(a, b.positions + column, first + k), p, Vec{});
    Vec ds = p * (load(b.dp + k * rows + column) - d) * scale;
    if (Kind::capped) ds *= 1.0f - (s * inverse_cap) * (s * inverse_cap);
    return ProbabilityAndGradient{p, ds};
  };
  const ProbabilityAndGradient zero = {};
  for (int64_t k = 0; k < block.padded; k += 2) {
    const auto even = k < block.count ? at(k) : zero, odd = k + 1 < block.count ? at(k + 1) : zero;
    store(b.p + k * rows + column, even.p);
    store(b.p + (k + 1) * rows + column, odd.p);
    Engine::store_pair(b.ds_right, b.ds, rows, k, column, even.ds, odd.ds);
  }
}

// Where a task adds the gradients of one block's keys and values.
struct BlockGradients {
  float *k, *v;
};

PEFTDYNO_INLINE BlockGradients gradients_of(const Attention& a, const KeyGradients& to, int64_t head, int64_t offset) {
  if (head == to.own.head) {
    const int64_t at = (offset - to.own.offset) * a.padded_width;
    return {to.own.k + at, to.own.v + at};
  }
  const int64_t at = (head * a.padded_keys + offset) * a.padded_width;
  return {to.all_k + at, to.all_v + at};
}

template <class T>
static void backward_block(const Attention& a, const QueryTask& task, const KeyBlock& block, const KeyLink& link,
                           bool masked, bool first, int64_t rows, const KeyGradients& target,
                           const BackwardBuffers<typename EngineOf<T>::type::Element>& b) {
  using Engine = typename EngineOf<T>::type;
  using E = typename Engine::Element;
  const int64_t d = a.padded_width, count = padded_to(block.count, 16);
  const Left<E> keys = key_operand<E, T>(a, block, task.head, false, b.keys);
  Engine::multiply(count, rows, d, keys.rows, keys.stride, b.q_transposed, rows, b.s, rows, false);
  const Left<E> values = key_operand<E, T>(a, block, task.head, true, b.keys);
  Engine::multiply(count, rows, d, values.rows, values.stride, b.dout_transposed, rows, b.dp, rows, false);
  for_kind(masked, a.softcap != 0.0f, [&](auto kind) {
    for (int64_t column = 0; column < rows; column += LANES)
      gradient_columns<Engine, decltype(kind)>(a, b, rows, column, block, block.row + link.shift);
  });
  const BlockGradients to = gradients_of(a, target, task.head, block.offset);
  Engine::multiply(count, d, rows, b.p, rows, b.dout_right, d, to.v, d, true);
  Engine::multiply(count, d, rows, b.ds, rows, b.q_right, d, to.k, d, true);
  const int64_t at = (task.head * a.padded_keys + block.offset) * d;
  Engine::multiply(d, rows, block.padded, static_cast<E*>(a.k_transposed) + at, block.padded, b.ds_right, rows, b.dq,
                   rows, !first);
}

template <class T>
static void backward_task(const Attention& a, const QueryTask& task, const KeyGradients& target, Scratch scratch) {
  using E = typename EngineOf<T>::type::Element;
  const int64_t rows = padded_to(task.count * a.groups, 32);
  const BackwardBuffers<E> b(scratch, rows, a.padded_width);
  load_task<T>(a, task, rows, b);
  bool first = true;
  for (int64_t l = task.first_link; l < task.last_link; ++l)
    for (int64_t j = a.links[l].first; j < a.links[l].last; ++j) {
      const Sight view = sight(a, a.blocks[j], a.links[l], task);
      if (view == Sight::none) continue;
      backward_block<T>(a, task, a.blocks[j], a.links[l], view == Sight::part, first, rows, target, b);
      first = false;
    }
  scatter_columns<T>(b.dq, rows, a.dq, a.dq_head_stride, a, task, b.s);
}

template <class T>
static void backward_tasks(const Attention& a, const KeyGradients& target, int64_t begin, int64_t end, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i) backward_task<T>(a, a.tasks[i], target, {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

template <class T>
static void store_row(const float* from, int64_t width, T* to) {
  for (int64_t i = 0; i < width; i += LANES) store_upto(to + i, load(from + i), width - i);
}

// The gradients of one block's keys that parts have apart, to those of the rest.
static void add_shared(const Attention& a, const KeyGradientRows& to, int64_t head, const KeyBlock& keys) {
  const int64_t at = (head * a.padded_keys + keys.offset) * a.padded_width;
  for (int64_t t = 0; t < to.num_parts; ++t) {
    const SharedKeyGradients& part = to.parts[t];
    if (part.head != head || keys.offset < part.offset || keys.offset >= part.offset + part.keys) continue;
    const int64_t from = (keys.offset - part.offset) * a.padded_width;
    for (int64_t i = 0; i < keys.padded * a.padded_width; i += LANES) {
      store(to.k + at + i, load(to.k + at + i) + load(part.k + from + i));
      store(to.v + at + i, load(to.v + at + i) + load(part.v + from + i));
    }
  }
}

template <class T>
static void store_keys(const Attention& a, const KeyGradientRows& to, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const int64_t head = j / a.num_blocks;
    const KeyBlock& keys = a.blocks[j % a.num_blocks];
    add_shared(a, to, head, keys);
    for (int64_t r = 0; r < keys.count; ++r) {
      const int64_t row = keys.row + r, at = (head * a.padded_keys + keys.offset + r) * a.padded_width;
      if (row < a.num_keys) {
        T* fused = row_of<T>(to.fused, row) + head * a.width;
        store_row(to.k + at, a.width, fused + to.k_column);
        store_row(to.v + at, a.width, fused + to.v_column);
      } else {
        const int64_t start = (row - a.num_keys) * to.prefix_stride + head * a.width;
        store_row(to.k + at, a.width, to.prefix_k + start);
        store_row(to.v + at, a.width, to.prefix_v + start);
      }
    }
  }
}

static void attention_store_keys(const Attention& a, const KeyGradientRows& to, int64_t begin, int64_t end) {
  a.bf16 ? store_keys<bfloat16>(a, to, begin, end) : store_keys<float>(a, to, begin, end);
}

static void attention_backward(const Attention& a, const KeyGradients& target, int64_t begin, int64_t end,
                               void* scratch) {
  a.bf16 ? backward_tasks<bfloat16>(a, target, begin, end, scratch)
         : backward_tasks<float>(a, target, begin, end, scratch);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
