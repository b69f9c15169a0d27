// What a processor multiplies at most without tiles, from registers alone, by instruction and threads: `make bench-dots`.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int64_t STEPS = 1 << 21;
constexpr int SUMS = 14, TURNS = 9;  // sums hide the latency of one another

// An instruction that adds to each of the sums products of zeros, which take as long as others.
#define FOURTEEN(begin) \
  begin "0\n" begin "1\n" begin "2\n" begin "3\n" begin "4\n" begin "5\n" begin "6\n" begin "7\n" begin "8\n" \
  begin "9\n" begin "10\n" begin "11\n" begin "12\n" begin "13\n"
#define LOOP(name, isa, mnemonic, r) \
  __attribute__((target(isa))) void name() { \
    asm volatile("vxorps %%ymm15, %%ymm15, %%ymm15" ::: REGISTERS); \
    for (int64_t i = 0; i < STEPS; ++i) asm volatile(FOURTEEN(mnemonic " %%" r "15, %%" r "15, %%" r) ::: REGISTERS); \
  }
#define REGISTERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
  "xmm12", "xmm13", "xmm15"
LOOP(dots, "avx512f,avx512bf16", "vdpbf16ps", "zmm")
LOOP(wide, "avx512f", "vfmadd231ps", "zmm")
LOOP(narrow, "avx2,fma", "vfmadd231ps", "ymm")

struct Loop {
  const char* name;
  void (*run)();
  bool available;
  double flops;  // of an instruction
};

// Seconds until every thread has run a loop.
double seconds(const Loop& loop, unsigned count) {
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (unsigned t = 0; t < count; ++t) threads.emplace_back(loop.run);
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main() {
  const unsigned processors = std::max(1u, std::thread::hardware_concurrency());
  const Loop loops[] = {
      {"bf16 dot products of 512 bits", dots, __builtin_cpu_supports("avx512bf16") != 0, 64},
      {"fp32 products of 512 bits", wide, __builtin_cpu_supports("avx512f") != 0, 32},
      {"fp32 products of 256 bits", narrow, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), 16},
  };
  std::printf("%-32s %8s %22s\n", "instruction", "threads", "GFLOP/s: median, most");
  for (const Loop& loop : loops) {
    if (!loop.available) {
      std::printf("%-32s not on this processor\n", loop.name);
      continue;
    }
    for (const unsigned count : processors > 1 ? std::vector<unsigned>{1, processors} : std::vector<unsigned>{1}) {
      std::vector<double> rates;
      for (int turn = 0; turn < TURNS; ++turn)
        rates.push_back(count * loop.flops * SUMS * STEPS / seconds(loop, count) * 1e-9);
      std::sort(rates.begin(), rates.end());
      std::printf("%-32s %8u %11.0f %10.0f\n", loop.name, count, rates[TURNS / 2], rates.back());
    }
  }
}
