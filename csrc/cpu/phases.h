// An operator's work as phases of units within one parallel region. Threads come for one unit after another, so that one
// which its processor slows down takes fewer; what a unit computes must not depend on whose it is.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels.h"

namespace peftdyno {

class Phase {
 public:
  explicit Phase(int64_t units) : units_(units) {}

  // f(unit) until no unit is left.
  template <class F>
  void work(const F& f) {
    int64_t unit;
    while ((unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_) {
      f(unit);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Until every unit is done. Whoever took one is at work on it, so this ends for any number of threads.
  void wait() const {
    for (int64_t tries = 0; done_.load(std::memory_order_acquire) < units_; ++tries)
      if (tries > 1 << 14) std::this_thread::yield();
  }

  template <class F>
  void finish(const F& f) {
    work(f);
    wait();
  }

 private:
  const int64_t units_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// Threads worth starting for so many units.
inline int64_t threads_for(int64_t units) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), units));
}

// f(thread) once for each of `threads`.
template <class F>
void in_parallel(int64_t threads, const F& f) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(thread);
  });
}

constexpr int64_t SOME_MICROSECONDS = 16384;  // elements of rows that are worth a unit

// f(begin, end) on blocks of the rows.
template <class F>
void for_rows(int64_t num_rows, int64_t width, const F& f) {
  const int64_t block = std::max<int64_t>(1, SOME_MICROSECONDS / std::max<int64_t>(1, width));
  Phase phase(ratio_up(num_rows, block));
  in_parallel(threads_for(ratio_up(num_rows, block)), [&](int64_t) {
    phase.work([&](int64_t i) { f(i * block, std::min(num_rows, (i + 1) * block)); });
  });
}

}  // namespace peftdyno
