// Attention of queries that are alone in their segment, as in decoding; equations in kernels/attention.py.
//
// Keys and values are read once, where they lie, and multiplied in fp32: a key meets only the query heads of its group, so
// that laying out operands for block products takes longer than the products. Scores have a query head down, keys across.
#pragma once

#include "attention_rows.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

constexpr int HEADS_AT_ONCE = 4;  // query heads whose sums stay in registers

struct SingleBuffers {
  float *q, *s, *o, *parts, *top, *total;

  SingleBuffers(Scratch scratch, int64_t heads, int64_t width) {
    q = scratch.take<float>(heads * width);
    s = scratch.take<float>(HEADS_AT_ONCE * KEY_BLOCK);
    o = scratch.take<float>(heads * width);
    parts = scratch.take<float>(HEADS_AT_ONCE * LANES * LANES);
    top = scratch.take<float>(heads);
    total = scratch.take<float>(heads);
  }
};

// Some keys side by side that a query sees, and their values; rows are so many elements apart.
template <class T>
struct SeenKeys {
  int64_t head, count;
  const T *keys, *values;
  int64_t key_stride, value_stride;
};

// Asks for rows that are read soon, one after another; they lie too far apart for the processor to ask by itself.
template <class T>
class AskedRows {
 public:
  PEFTDYNO_MEMBER AskedRows(const T* rows, int64_t stride, int64_t count, int64_t width)
      : row_(rows), last_(rows + (count - 1) * stride), stride_(stride), width_(width) {}

  PEFTDYNO_MEMBER void next() {
    for (int64_t i = 0; i < width_; i += 2 * LINE) {
      ask_for(row_ + i);
      ask_for(row_ + i + LINE);
    }
    row_ = row_ < last_ ? row_ + stride_ : last_;
  }

 private:
  static constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(T));
  const T *row_, *last_;
  int64_t stride_, width_;
};

// Keys `first` to `end - 1` of a block, which lie in the same tensor.
template <class T>
PEFTDYNO_INLINE SeenKeys<T> keys_at(const Attention& a, const KeyBlock& block, int64_t head, int64_t first, int64_t end) {
  const bool prefix = block.row + first >= a.num_keys;
  return {head,
          end - first,
          key_row<T>(a, block, head, false, first),
          key_row<T>(a, block, head, true, first),
          prefix ? a.prefix_k.stride : a.k.stride,
          prefix ? a.prefix_v.stride : a.v.stride};
}

template <int N>
struct HeadCount {
  static constexpr int value = N;
};

// f(first head, HeadCount) for all heads, some at once.
template <class F>
PEFTDYNO_INLINE void for_heads(int64_t heads, const F& f) {
  int64_t g = 0;
  for (; g + HEADS_AT_ONCE <= heads; g += HEADS_AT_ONCE) f(g, HeadCount<HEADS_AT_ONCE>{});
  if (heads - g == 3) f(g, HeadCount<3>{});
  if (heads - g == 2) f(g, HeadCount<2>{});
  if (heads - g == 1) f(g, HeadCount<1>{});
}

// Adds the products of a key with some heads to LANES partial sums each.
template <class T, int HEADS>
PEFTDYNO_INLINE void add_products(const T* key, int64_t width, const float* q, int64_t q_stride, Vec* sums) {
  int64_t i = 0;
  const auto add = [&](Vec x) {
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; ++g) sums[g] += x * load(q + g * q_stride + i);
  };
  for (; i + LANES <= width; i += LANES) add(load(key + i));
  if (i < width) add(load_some(key + i, width - i));
}

// Scores of the heads and the keys, KEY_BLOCK apart; -inf where a lane has no key.
template <class T, class Kind, int HEADS>
PEFTDYNO_INLINE void score_keys(const Attention& a, const SeenKeys<T>& keys, const SeenKeys<T>& next,
                                const float* q, float* parts, float* s) {
  VecI lane;
  for (int64_t i = 0; i < LANES; ++i) lane[i] = static_cast<int32_t>(i);
  const int64_t width = a.width, d = a.padded_width, stride = keys.key_stride;
  AskedRows<T> next_keys(next.keys, next.key_stride, next.count, width);
  AskedRows<T> next_values(next.values, next.value_stride, next.count, width);
  const T* key = keys.keys;
  for (int64_t from = 0; from < keys.count; from += LANES) {
    const int64_t count = smaller(LANES, keys.count - from);
    for (int64_t k = 0; k < count; ++k, key += stride) {
      next_keys.next();
      next_values.next();
      Vec sums[HEADS] = {};
      add_products<T, HEADS>(key, width, q, d, sums);
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; ++g) store(parts + (g * LANES + k) * LANES, sums[g]);
    }
    const VecI inside = lane < static_cast<int32_t>(count);
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; ++g) {
      const Vec v = prepared<Kind>(a, row_sums(parts + g * LANES * LANES));
      store(s + g * KEY_BLOCK + from, select(inside, v, broadcast(-__builtin_inff())));
    }
  }
}

// Turns a head's scores into probabilities against its running maximum; gives the factor for what was added before.
PEFTDYNO_INLINE Vec softmax_row(const Attention& a, int64_t count, float* s, float* top, float* total) {
  Vec best = broadcast(-__builtin_inff());
  for (int64_t k = 0; k < count; k += LANES) best = maximum(load(s + k), best);
  const Vec before = broadcast(*top), after = maximum(broadcast(largest(best)) * score_factor(a), before);
  const Vec base = select(after == broadcast(-__builtin_inff()), Vec{}, after);
  Vec sums = {};
  for (int64_t k = 0; k < count; k += LANES) {
    const Vec x = load(s + k) * score_factor(a) - base;
    const Vec probability = select(x < -126.0f, Vec{}, exp2(x));
    store(s + k, probability);
    sums += probability;
  }
  const Vec rescale = exp2(before - base);
  *top = after[0];
  *total = *total * rescale[0] + sum(sums);
  return rescale;
}

// o = rescale o + p V in 2 LANES columns, or where not `WHOLE` in what is left of them.
template <class T, int HEADS, bool WHOLE>
PEFTDYNO_INLINE void add_columns(const Attention& a, const SeenKeys<T>& keys, const float* p, const Vec* rescale,
                                 int64_t column, float* o) {
  const int64_t left = a.width - column, d = a.padded_width;
  Vec sums[HEADS][2];
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) sums[g][c] = load(o + g * d + column + c * LANES) * rescale[g];
  const T* value = keys.values + column;
  for (int64_t k = 0; k < keys.count; ++k, value += keys.value_stride)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const Vec x = WHOLE ? load(value + c * LANES) : load_upto(value + c * LANES, left - c * LANES);
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; ++g) sums[g][c] += x * p[g * KEY_BLOCK + k];
    }
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) store(o + g * d + column + c * LANES, sums[g][c]);
}

template <class T, class Kind>
static void attend_block(const Attention& a, const SeenKeys<T>& keys, const SeenKeys<T>& next,
                         const SingleBuffers& b) {
  for_heads(a.groups, [&](int64_t first, auto count) {
    constexpr int HEADS = decltype(count)::value;
    const int64_t row = keys.head * a.groups + first, d = a.padded_width;
    score_keys<T, Kind, HEADS>(a, keys, next, b.q + row * d, b.parts, b.s);
    Vec rescale[HEADS];
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; ++g) {
      const int64_t at = g * KEY_BLOCK;
      rescale[g] = softmax_row(a, keys.count, b.s + at, b.top + row + g, b.total + row + g);
    }
    int64_t column = 0;
    for (; column + 2 * LANES <= a.width; column += 2 * LANES)
      add_columns<T, HEADS, true>(a, keys, b.s, rescale, column, b.o + row * d);
    if (column < a.width) add_columns<T, HEADS, false>(a, keys, b.s, rescale, column, b.o + row * d);
  });
}

// f(keys) for what a query sees of a block.
template <class T, class F>
PEFTDYNO_INLINE void for_keys_of_block(const Attention& a, const KeyBlock& block, const KeyLink& link,
                                       const QueryTask& task, int64_t heads, const F& f) {
  const int64_t query = task.position - (block.row + link.shift);  // its own place among the block's keys
  const int64_t first = a.window != 0 && query >= a.window ? query - a.window + 1 : 0;
  const int64_t end = smaller(query + 1, block.count), inner = a.num_keys - block.row;
  const int64_t middle = inner <= first ? first : smaller(inner, end);
  for (int64_t head = task.head; head < task.head + heads; ++head) {
    if (first < middle) f(keys_at<T>(a, block, head, first, middle));
    if (middle < end) f(keys_at<T>(a, block, head, middle, end));
  }
}

// f(keys, the keys after them) for all that a query sees.
template <class T, class F>
PEFTDYNO_INLINE void for_seen_keys(const Attention& a, const QueryTask& task, int64_t heads, const F& f) {
  SeenKeys<T> held{};
  for (int64_t l = task.first_link; l < task.last_link; ++l)
    for (int64_t j = a.links[l].first; j < a.links[l].last; ++j)
      for_keys_of_block<T>(a, a.blocks[j], a.links[l], task, heads, [&](const SeenKeys<T>& keys) {
        if (held.count > 0) f(held, keys);
        held = keys;
      });
  if (held.count > 0) f(held, held);
}

template <class T>
static void single_query(const Attention& a, const QueryTask& task, int64_t heads, Scratch scratch) {
  const SingleBuffers b(scratch, (task.head + heads) * a.groups, a.padded_width);
  const int64_t first = task.head * a.groups, last = first + heads * a.groups, d = a.padded_width;
  for (int64_t h = first; h < last; ++h) {
    copy_row(row_of<T>(a.q, task.row) + h * a.q_head_stride, a.width, d, nullptr, b.q + h * d);
    for (int64_t c = 0; c < d; c += LANES) store(b.o + h * d + c, Vec{});
    b.top[h] = -__builtin_inff(), b.total[h] = 0.0f;
  }
  for_seen_keys<T>(a, task, heads, [&](const SeenKeys<T>& keys, const SeenKeys<T>& next) {
    if (a.softcap != 0.0f)
      attend_block<T, ScoreKind<false, true>>(a, keys, next, b);
    else
      attend_block<T, ScoreKind<false, false>>(a, keys, next, b);
  });
  for (int64_t h = first; h < last; ++h) {
    T* out = row_of<T>(a.out, task.row) + h * a.width;
    const float share = 1.0f / b.total[h];
    for (int64_t c = 0; c < a.width; c += LANES) store_upto(out + c, load(b.o + h * d + c) * share, a.width - c);
    a.lse[h * a.num_queries + task.row] = b.top[h] / LOG2_E + __builtin_logf(b.total[h]);
  }
}

static void attention_single(const Attention& a, int64_t task, int64_t heads, void* scratch) {
  const Scratch room{static_cast<uint8_t*>(scratch)};
  a.bf16 ? single_query<bfloat16>(a, a.tasks[task], heads, room) : single_query<float>(a, a.tasks[task], heads, room);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
