// Blocked attention with an online softmax (Dao 2023), forward and backward; equations in kernels/attention.py.
#pragma once

#include "attention_plan.h"
#include "matrix.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

// The row pointers of a block of keys of one head.
template <class T>
static void key_rows(const Attention& a, const KeyBlock& block, int64_t head, bool values, const T** rows) {
  const Rows &inner = values ? a.v : a.k, &prefix = values ? a.prefix_v : a.prefix_k;
  const int64_t head_stride = values ? a.v_head_stride : a.k_head_stride;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = block.row + i;
    rows[i] = row < a.num_keys ? row_of<T>(inner, row) + head * head_stride
                               : row_of<T>(prefix, row - a.num_keys) + head * a.prefix_head_stride;
  }
}

template <class T>
static void pack_keys(const Attention& a, int64_t begin, int64_t end) {
  using Engine = typename EngineOf<T>::type;
  using E = typename Engine::Element;
  const T* rows[KEY_BLOCK];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / a.num_blocks;
    const KeyBlock& block = a.blocks[i % a.num_blocks];
    const int64_t at = (head * a.padded_keys + block.offset) * a.padded_width;
    auto pack = [&](void* target, bool values, bool transposed) {
      if (target == nullptr) return;
      key_rows(a, block, head, values, rows);
      E* b = static_cast<E*>(target) + at;
      if (transposed)
        Engine::pack_transposed(rows, block.count, block.padded, a.width, a.padded_width, b);
      else
        Engine::pack_rows(rows, block.count, block.padded, a.width, a.padded_width, b);
    };
    pack(a.packed_k_transposed, false, true);
    pack(a.packed_k, false, false);
    pack(a.packed_v_transposed, true, true);
    pack(a.packed_v, true, false);
  }
}

// One task's rows (query i, head g -> row i * groups + g) of a [N, heads * width] matrix.
template <class T>
PEFTDYNO_INLINE const T* task_row(const Rows& rows, int64_t head_stride, const Attention& a, const QueryTask& task,
                                  int64_t row) {
  return row_of<T>(rows, task.row + row / a.groups) + (task.head * a.groups + row % a.groups) * head_stride;
}

template <class E, class T>
static void gather_rows(const Rows& rows, int64_t head_stride, const Attention& a, const QueryTask& task,
                        int64_t padded_rows, E* block) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    const bool inside = r < task.count * a.groups;
    const T* source = inside ? task_row<T>(rows, head_stride, a, task, r) : nullptr;
    for (int64_t i = 0; i < a.padded_width; i += LANES)
      store(block + r * a.padded_width + i, inside && i < a.width ? load_upto(source + i, a.width - i) : Vec{});
  }
}

template <class E>
static void transpose(const E* block, int64_t rows, int64_t columns, E* target) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) target[c * rows + r] = block[r * columns + c];
}

// Columns low to high - 1 of a block are visible to a query; none where high <= low.
struct Span {
  int64_t low, high;
};

PEFTDYNO_INLINE Span visible(const Attention& a, const KeyBlock& block, const KeyLink& link, int64_t position) {
  const int64_t first = block.row + link.shift, after = position + 1 - first;
  return {a.window != 0 && after > a.window ? after - a.window : 0, after < block.count ? after : block.count};
}

PEFTDYNO_INLINE bool any_visible(const Attention& a, const KeyBlock& block, const KeyLink& link, const QueryTask& task) {
  const int64_t first = block.row + link.shift, last = first + block.count - 1;
  return first <= task.position + task.count - 1 && (a.window == 0 || last > task.position - a.window);
}

PEFTDYNO_INLINE VecI inside(Span span, int64_t column) {
  VecI lane;
  for (int64_t i = 0; i < LANES; ++i) lane[i] = static_cast<int32_t>(i);
  lane += static_cast<int32_t>(column);
  return (lane >= static_cast<int32_t>(span.low)) & (lane < static_cast<int32_t>(span.high));
}

PEFTDYNO_INLINE Vec score(const Attention& a, Vec s) {
  s *= a.scale;
  return a.softcap != 0.0f ? a.softcap * tanh(s / a.softcap) : s;
}

// Turns a row of scores into probabilities against the running maximum; returns the factor for what was summed before.
template <class E>
static float softmax_row(const Attention& a, float* s, int64_t padded, Span span, E* p, float& top, float& total) {
  const float minus_infinity = -__builtin_inff();
  Vec best = broadcast(minus_infinity);
  for (int64_t i = 0; i < padded; i += LANES) {
    Vec v = select(inside(span, i), score(a, load(s + i)), broadcast(minus_infinity));
    store(s + i, v);
    best = maximum(v, best);
  }
  const float block_top = largest(best), new_top = block_top > top ? block_top : top;
  const float base = new_top == minus_infinity ? 0.0f : new_top;
  Vec added = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    Vec v = exp(load(s + i) - base);
    added += v;
    store(p + i, v);
  }
  const float factor = exp(broadcast(top - base))[0];
  total = total * factor + sum(added);
  top = new_top;
  return factor;
}

template <class Engine, class T>
static void forward_task(const Attention& a, const QueryTask& task, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t d = a.padded_width, rows = task.count * a.groups, padded_rows = padded_to(rows, Engine::ROW_UNIT);
  E *q = scratch.take<E>(padded_rows * d), *p = scratch.take<E>(padded_rows * KEY_BLOCK);
  float *s = scratch.take<float>(padded_rows * KEY_BLOCK), *o = scratch.take<float>(padded_rows * d);
  float *top = scratch.take<float>(padded_rows), *total = scratch.take<float>(padded_rows);
  gather_rows<E, T>(a.q, a.q_head_stride, a, task, padded_rows, q);
  for (int64_t i = 0; i < padded_rows * d; i += LANES) store(o + i, Vec{});
  for (int64_t r = 0; r < padded_rows; ++r) top[r] = -__builtin_inff(), total[r] = 0.0f;
  for (int64_t i = 0; i < padded_rows * KEY_BLOCK; i += LANES) store(p + i, Vec{});
  for (int64_t l = task.first_link; l < task.last_link; ++l)
    for (int64_t j = a.links[l].first; j < a.links[l].last; ++j) {
      const KeyBlock& block = a.blocks[j];
      if (!any_visible(a, block, a.links[l], task)) continue;
      const int64_t at = (task.head * a.padded_keys + block.offset) * d;
      Engine::multiply(padded_rows, block.padded, d, q, d, static_cast<E*>(a.packed_k_transposed) + at, block.padded, s,
                       KEY_BLOCK, false);
      for (int64_t r = 0; r < rows; ++r) {
        const Span span = visible(a, block, a.links[l], task.position + r / a.groups);
        const float factor =
            softmax_row(a, s + r * KEY_BLOCK, block.padded, span, p + r * KEY_BLOCK, top[r], total[r]);
        if (factor != 1.0f)
          for (int64_t i = 0; i < d; i += LANES) store(o + r * d + i, load(o + r * d + i) * factor);
      }
      Engine::multiply(padded_rows, d, block.padded, p, KEY_BLOCK, static_cast<E*>(a.packed_v) + at, d, o, d, true);
    }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = task.row + r / a.groups, head = task.head * a.groups + r % a.groups;
    T* out = row_of<T>(a.out, query) + head * a.width;
    const float inverse = 1.0f / total[r];
    for (int64_t i = 0; i < a.width; i += LANES) store_upto(out + i, load(o + r * d + i) * inverse, a.width - i);
    a.lse[head * a.num_queries + query] = top[r] + __builtin_logf(total[r]);
  }
}

template <class T>
static void forward_tasks(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i) forward_task<Engine, T>(a, a.tasks[i], {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

struct ProbabilityAndGradient {
  Vec p, ds;
};

// p = exp(s - lse) and scale * dS of LANES columns of one row, zero where a key is not visible.
PEFTDYNO_INLINE ProbabilityAndGradient gradients(const Attention& a, const float* s, const float* dp, Span span,
                                                 int64_t column, float lse, float d) {
  Vec y = score(a, load(s + column));
  Vec p = select(inside(span, column), exp(y - lse), Vec{});
  Vec ds = p * (load(dp + column) - d);
  if (a.softcap != 0.0f) ds *= 1.0f - (y / a.softcap) * (y / a.softcap);
  return {p, ds * a.scale};
}

template <class Engine>
struct BackwardBuffers {
  using E = typename Engine::Element;
  E *q, *dout, *q_transposed, *dout_transposed, *ds, *p_pairs, *ds_pairs;
  float *s, *dp, *dq, *lse, *d;

  BackwardBuffers(Scratch scratch, int64_t rows, int64_t width) {
    E** wide[] = {&q, &dout, &q_transposed, &dout_transposed};
    E** narrow[] = {&ds, &p_pairs, &ds_pairs};
    for (E** operand : wide) *operand = scratch.take<E>(rows * width);
    for (E** operand : narrow) *operand = scratch.take<E>(rows * KEY_BLOCK);
    s = scratch.take<float>(rows * KEY_BLOCK);
    dp = scratch.take<float>(rows * KEY_BLOCK);
    dq = scratch.take<float>(rows * width);
    lse = scratch.take<float>(rows);
    d = scratch.take<float>(rows);
  }
};

template <class Engine, class T>
static void load_task(const Attention& a, const QueryTask& task, int64_t rows, int64_t padded_rows,
                      const BackwardBuffers<Engine>& b) {
  using E = typename Engine::Element;
  gather_rows<E, T>(a.q, a.q_head_stride, a, task, padded_rows, b.q);
  gather_rows<E, T>(a.dout, a.width, a, task, padded_rows, b.dout);
  transpose(b.q, padded_rows, a.padded_width, b.q_transposed);
  transpose(b.dout, padded_rows, a.padded_width, b.dout_transposed);
  for (int64_t r = 0; r < rows; ++r) {
    const T *o = task_row<T>(a.out, a.width, a, task, r), *g = task_row<T>(a.dout, a.width, a, task, r);
    Vec products = {};
    for (int64_t i = 0; i < a.width; i += LANES) products += load_upto(o + i, a.width - i) * load_upto(g + i, a.width - i);
    b.d[r] = sum(products);
    b.lse[r] = a.lse[(task.head * a.groups + r % a.groups) * a.num_queries + task.row + r / a.groups];
  }
  for (int64_t i = 0; i < padded_rows * a.padded_width; i += LANES) store(b.dq + i, Vec{});
}

template <class Engine>
static void probability_block(const Attention& a, const QueryTask& task, const KeyBlock& block, const KeyLink& link,
                              int64_t padded_rows, const BackwardBuffers<Engine>& b) {
  const int64_t rows = task.count * a.groups;
  auto span_of = [&](int64_t r) {
    return r < rows ? visible(a, block, link, task.position + r / a.groups) : Span{0, 0};
  };
  for (int64_t r = 0; r < padded_rows; r += 2) {
    const Span even = span_of(r), odd = span_of(r + 1);
    const float *s = b.s + r * KEY_BLOCK, *dp = b.dp + r * KEY_BLOCK;
    const float lse_even = r < rows ? b.lse[r] : 0.0f, lse_odd = r + 1 < rows ? b.lse[r + 1] : 0.0f;
    const float d_even = r < rows ? b.d[r] : 0.0f, d_odd = r + 1 < rows ? b.d[r + 1] : 0.0f;
    for (int64_t i = 0; i < block.padded; i += LANES) {
      auto first = gradients(a, s, dp, even, i, lse_even, d_even);
      auto second = gradients(a, s + KEY_BLOCK, dp + KEY_BLOCK, odd, i, lse_odd, d_odd);
      store(b.ds + r * KEY_BLOCK + i, first.ds);
      store(b.ds + (r + 1) * KEY_BLOCK + i, second.ds);
      Engine::store_pair(b.p_pairs, KEY_BLOCK, r, i, first.p, second.p);
      Engine::store_pair(b.ds_pairs, KEY_BLOCK, r, i, first.ds, second.ds);
    }
  }
}

template <class Engine, class T>
static void backward_task(const Attention& a, const QueryTask& task, const KeyGradients& target, Scratch scratch) {
  using E = typename Engine::Element;
  const int64_t d = a.padded_width, rows = task.count * a.groups, padded_rows = padded_to(rows, 32);
  const BackwardBuffers<Engine> b(scratch, padded_rows, d);
  load_task<Engine, T>(a, task, rows, padded_rows, b);
  const bool own = task.head == target.shared_head;
  for (int64_t l = task.first_link; l < task.last_link; ++l)
    for (int64_t j = a.links[l].first; j < a.links[l].last; ++j) {
      const KeyBlock& block = a.blocks[j];
      if (!any_visible(a, block, a.links[l], task)) continue;
      const int64_t n = block.padded, at = (task.head * a.padded_keys + block.offset) * d;
      const int64_t to = own ? (block.offset - target.own_offset) * d : at;
      Engine::multiply(padded_rows, n, d, b.q, d, static_cast<E*>(a.packed_k_transposed) + at, n, b.s, KEY_BLOCK, false);
      Engine::multiply(padded_rows, n, d, b.dout, d, static_cast<E*>(a.packed_v_transposed) + at, n, b.dp, KEY_BLOCK,
                       false);
      probability_block<Engine>(a, task, block, a.links[l], padded_rows, b);
      Engine::multiply(padded_rows, d, n, b.ds, KEY_BLOCK, static_cast<E*>(a.packed_k) + at, d, b.dq, d, true);
      Engine::multiply(d, n, padded_rows, b.q_transposed, padded_rows, b.ds_pairs, KEY_BLOCK,
                       (own ? target.own_k : target.all_k) + to, n, true);
      Engine::multiply(d, n, padded_rows, b.dout_transposed, padded_rows, b.p_pairs, KEY_BLOCK,
                       (own ? target.own_v : target.all_v) + to, n, true);
    }
  for (int64_t r = 0; r < rows; ++r) {
    T* dq = row_of<T>(a.dq, task.row + r / a.groups) + (task.head * a.groups + r % a.groups) * a.dq_head_stride;
    for (int64_t i = 0; i < a.width; i += LANES) store_upto(dq + i, load(b.dq + r * d + i), a.width - i);
  }
}

template <class T>
static void backward_tasks(const Attention& a, const KeyGradients& target, int64_t begin, int64_t end, void* scratch) {
  using Engine = typename EngineOf<T>::type;
  Engine::begin();
  for (int64_t i = begin; i < end; ++i)
    backward_task<Engine, T>(a, a.tasks[i], target, {static_cast<uint8_t*>(scratch)});
  Engine::end();
}

// Writes one block's gradient [padded_width, padded] as rows of keys.
template <class T>
static void store_key_rows(const float* block, const KeyBlock& keys, int64_t row, int64_t width, T* target,
                           int64_t stride) {
  for (int64_t i = 0; i < width; i += LANES) {
    Vec v;
    for (int64_t lane = 0; lane < LANES; ++lane) v[lane] = block[(i + lane) * keys.padded + row];
    store_upto(target + row * stride + i, v, width - i);
  }
}

template <class T>
static void store_keys(const Attention& a, const KeyGradientRows& to, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const int64_t head = j / a.num_blocks;
    const KeyBlock& keys = a.blocks[j % a.num_blocks];
    const int64_t at = (head * a.padded_keys + keys.offset) * a.padded_width;
    for (int64_t r = 0; r < keys.count; ++r) {
      const int64_t inner = keys.row, prefix = keys.row - a.num_keys;
      if (keys.row + r < a.num_keys) {
        T* rows = row_of<T>(to.fused, inner) + head * a.width;
        store_key_rows(to.k + at, keys, r, a.width, rows + to.k_column, to.fused.stride);
        store_key_rows(to.v + at, keys, r, a.width, rows + to.v_column, to.fused.stride);
      } else {
        const int64_t start = prefix * to.prefix_stride + head * a.width;
        store_key_rows(to.k + at, keys, r, a.width, to.prefix_k + start, to.prefix_stride);
        store_key_rows(to.v + at, keys, r, a.width, to.prefix_v + start, to.prefix_stride);
      }
    }
  }
}

static void attention_store_keys(const Attention& a, const KeyGradientRows& to, int64_t begin, int64_t end) {
  a.bf16 ? store_keys<bfloat16>(a, to, begin, end) : store_keys<float>(a, to, begin, end);
}

static void attention_pack(const Attention& a, int64_t begin, int64_t end) {
  a.bf16 ? pack_keys<bfloat16>(a, begin, end) : pack_keys<float>(a, begin, end);
}

static void attention_forward(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  a.bf16 ? forward_tasks<bfloat16>(a, begin, end, scratch)
         : forward_tasks<float>(a, begin, end, scratch);
}

static void attention_backward(const Attention& a, const KeyGradients& target, int64_t begin, int64_t end,
                               void* scratch) {
  a.bf16 ? backward_tasks<bfloat16>(a, target, begin, end, scratch)
         : backward_tasks<float>(a, target, begin, end, scratch);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
