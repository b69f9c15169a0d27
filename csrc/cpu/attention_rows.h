// What forward and backward attention share: the rows of tasks and blocks, visibility, scores.
#pragma once

#include "attention_plan.h"
#include "block_rows.h"
#include "scratch.h"

namespace peftdyno {
namespace PEFTDYNO_ISA {

constexpr float LOG2_E = 1.44269504088896341f;

// Row i of a block of keys (or values) of one head.
template <class T>
PEFTDYNO_INLINE const T* key_row(const Attention& a, const KeyBlock& block, int64_t head, bool values, int64_t i) {
  const int64_t row = block.row + i;
  if (row >= a.num_keys)
    return row_of<T>(values ? a.prefix_v : a.prefix_k, row - a.num_keys) + head * a.prefix_head_stride;
  return row_of<T>(values ? a.v : a.k, row) + head * (values ? a.v_head_stride : a.k_head_stride);
}

template <class E, class T>
static void copy_keys(const Attention& a, const KeyBlock& block, int64_t head, bool values, E* to) {
  for (int64_t i = 0; i < block.padded; ++i) {
    ask_for_row(key_row<T>(a, block, head, values, smaller(i + ROWS_AHEAD, block.count - 1)), a.width);
    copy_row(key_row<T>(a, block, head, values, smaller(i, block.count - 1)), i < block.count ? a.width : 0,
             a.padded_width, nullptr, to + i * a.padded_width);
  }
}

// Keys or values as a left operand: as they lie where they can be used so, else copied to `spare`.
template <class E, class T>
static Left<E> key_operand(const Attention& a, const KeyBlock& block, int64_t head, bool values, E* spare) {
  if constexpr (sizeof(E) == sizeof(T)) {
    const bool together = block.row + block.count <= a.num_keys || block.row >= a.num_keys;
    if (together && block.count % 16 == 0 && a.width == a.padded_width) {
      const Rows& inner = values ? a.v : a.k;
      const Rows& prefix = values ? a.prefix_v : a.prefix_k;
      return {reinterpret_cast<const E*>(key_row<T>(a, block, head, values, 0)),
              block.row < a.num_keys ? inner.stride : prefix.stride};
    }
  }
  copy_keys<E, T>(a, block, head, values, spare);
  return {spare, a.padded_width};
}

// Transposes of keys and values, [padded_width, padded] for each block and head.
template <class T>
static void transpose_keys(const Attention& a, int64_t begin, int64_t end, Scratch scratch) {
  using Engine = typename EngineOf<T>::type;
  using E = typename Engine::Element;
  E *rows = scratch.take<E>(KEY_BLOCK * a.padded_width), *spare = scratch.take<E>(KEY_BLOCK * a.padded_width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / a.num_blocks;
    const KeyBlock& block = a.blocks[i % a.num_blocks];
    const int64_t at = (head * a.padded_keys + block.offset) * a.padded_width;
    for (int pass = 0; pass < 2; ++pass) {
      const bool values = pass == 1;
      void* target = values ? a.v_transposed : a.k_transposed;
      if (target == nullptr) continue;
      copy_keys<E, T>(a, block, head, values, rows);
      Engine::left_transposed(rows, block.padded, a.padded_width, static_cast<E*>(target) + at, spare);
    }
  }
}

// Query i of a task and head g of its group in a [N, heads * width] matrix; they are row i * groups + g of the task.
template <class T>
PEFTDYNO_INLINE T* task_row(const Rows& rows, int64_t head_stride, const Attention& a, const QueryTask& task, int64_t i,
                            int64_t g) {
  return row_of<T>(rows, task.row + i) + (task.head * a.groups + g) * head_stride;
}

// Where the log-sum of that row lies in [H, N].
PEFTDYNO_INLINE float* log_sum(const Attention& a, const QueryTask& task, int64_t i, int64_t g) {
  return a.lse + (task.head * a.groups + g) * a.num_queries + task.row + i;
}

template <class E, class T>
static void gather_rows(const Rows& rows, int64_t head_stride, const Attention& a, const QueryTask& task,
                        int64_t padded_rows, E* block) {
  const int64_t d = a.padded_width, used = task.count * a.groups;
  for (int64_t i = 0; i < task.count; ++i)
    for (int64_t g = 0; g < a.groups; ++g) {
      ask_for_row(task_row<T>(rows, head_stride, a, task, smaller(i + ROWS_AHEAD, task.count - 1), g), a.width);
      copy_row(task_row<T>(rows, head_stride, a, task, i, g), a.width, d, nullptr, block + (i * a.groups + g) * d);
    }
  for (int64_t r = used; r < padded_rows; ++r) copy_row(block, 0, d, nullptr, block + r * d);
}

// The reverse: columns of fp32 [padded_width, padded_rows] to the task's rows. `spare` holds as much.
template <class T>
static void scatter_columns(const float* columns, int64_t padded_rows, const Rows& rows, int64_t head_stride,
                            const Attention& a, const QueryTask& task, float* spare) {
  transpose_words(columns, a.padded_width, padded_rows, padded_rows, spare);
  for (int64_t i = 0; i < task.count; ++i)
    for (int64_t g = 0; g < a.groups; ++g, spare += a.padded_width) {
      T* to = task_row<T>(rows, head_stride, a, task, i, g);
      for (int64_t c = 0; c < a.width; c += LANES) store_upto(to + c, load(spare + c), a.width - c);
    }
}

// The position of the query of each row.
static void row_positions(const Attention& a, const QueryTask& task, int64_t padded_rows, int32_t* positions) {
  for (int64_t r = 0; r < padded_rows; ++r) positions[r] = static_cast<int32_t>(task.position + task.count - 1);
  for (int64_t i = 0; i < task.count; ++i)
    for (int64_t g = 0; g < a.groups; ++g) positions[i * a.groups + g] = static_cast<int32_t>(task.position + i);
}

enum class Sight { none, part, all };

// How much of a block the queries of a task see.
PEFTDYNO_INLINE Sight sight(const Attention& a, const KeyBlock& block, const KeyLink& link, const QueryTask& task) {
  const int64_t first = block.row + link.shift, last = first + block.count - 1;
  const int64_t low = task.position, high = task.position + task.count - 1;
  if (first > high || (a.window != 0 && last <= low - a.window)) return Sight::none;
  return last <= low && (a.window == 0 || first > high - a.window) ? Sight::all : Sight::part;
}

// Which lanes' queries see the key at a position.
PEFTDYNO_INLINE VecI seen(const Attention& a, const int32_t* positions, int64_t key_position) {
  VecI p;
  __builtin_memcpy(&p, positions, sizeof p);
  const int32_t key = static_cast<int32_t>(key_position);
  VecI result = p >= key;
  if (a.window != 0) result &= p < key + static_cast<int32_t>(a.window);
  return result;
}

// What the loops over scores are compiled for.
template <bool MASKED, bool CAPPED>
struct ScoreKind {
  static constexpr bool masked = MASKED, capped = CAPPED;
};

// f(ScoreKind) for one of the four kinds.
template <class F>
PEFTDYNO_INLINE void for_kind(bool masked, bool capped, const F& f) {
  if (masked)
    capped ? f(ScoreKind<true, true>{}) : f(ScoreKind<true, false>{});
  else
    capped ? f(ScoreKind<false, true>{}) : f(ScoreKind<false, false>{});
}

// A score in units of log 2 is factor * its prepared form; soft-capping takes the scale into that form.
template <class Kind>
PEFTDYNO_INLINE Vec prepared(const Attention& a, Vec s) {
  return Kind::capped ? a.softcap * tanh(s * (a.scale / a.softcap)) : s;
}

PEFTDYNO_INLINE float score_factor(const Attention& a) {
  return (a.softcap != 0.0f ? 1.0f : a.scale) * LOG2_E;
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno
