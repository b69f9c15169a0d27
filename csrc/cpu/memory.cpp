// Bytes that PyTorch's CPU allocator hands out on this thread, with their peak: the recorder of kernels/memory.py.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <algorithm>
#include <climits>
#include <memory>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "operators.h"

namespace peftdyno {
namespace {

namespace profiler = torch::profiler::impl;

// A profiler that is switched off in all but memory: PyTorch casts whatever holds the profiler's place, without asking,
// to its own base class whenever an autograd function runs.
class Recorder : public profiler::ProfilerStateBase {
 public:
  Recorder()
      : ProfilerStateBase(profiler::ProfilerConfig(profiler::ProfilerState::Disabled, /*report_input_shapes=*/false,
                                                   /*profile_memory=*/true)) {}
  profiler::ActiveProfilerType profilerType() override { return profiler::ActiveProfilerType::NONE; }
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    live_ += size;
    if (size > 0) ++allocations_;
    peak_ = std::max(peak_, live_);
  }
  void reset_peak() { peak_ = live_; }
  std::tuple<int64_t, int64_t, int64_t> figures() const { return {peak_, live_, allocations_}; }

 private:
  int64_t live_ = 0, peak_ = 0, allocations_ = 0;
};

Recorder& active() {
  auto* info = c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
  auto* recorder = dynamic_cast<Recorder*>(info);
  TORCH_CHECK(recorder != nullptr, "the memory recorder is not running on this thread");
  return *recorder;
}

}  // namespace

void memory_start() {
  TORCH_CHECK(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == nullptr,
              "a profiler or a memory recorder is already running on this thread");
  c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Recorder>());
}

std::tuple<int64_t, int64_t, int64_t> memory_now() {
  return active().figures();
}

void memory_reset_peak() {
  active().reset_peak();
}

// Large blocks come from a heap that the process keeps: a step asks for the same sizes again and again, and fresh pages
// from the kernel, each faulted in and cleared, took a good part of its time.
void memory_retain() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

std::tuple<int64_t, int64_t, int64_t> memory_stop() {
  const auto figures = active().figures();
  c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
  return figures;
}

}  // namespace peftdyno
