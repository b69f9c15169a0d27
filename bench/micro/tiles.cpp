// What a product of tiles (AMX) costs, by how many tiles a loop has in use: `make bench-tiles`.
//
// Each loop multiplies what lies in the first-level cache. They take turns, and quantiles over the turns show how much
// of the time another thread of the core kept tiles too.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr long PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl, and the state it asks for
constexpr int STEPS = 400, TURNS = 600, STRIDE = 1152;  // bytes from row to row of the left factor

alignas(4096) uint8_t memory[1 << 20];

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of the left and the right factor at a step of the depth.
#define LEFT(tile, row_block) _tile_loadd(tile, memory + step % 8 * 64 + (row_block)*16 * STRIDE, STRIDE)
#define RIGHT(tile, half) _tile_loadd(tile, memory + 65536 + step % 8 * 2048 + (half)*1024, 64)
#define PRODUCT _tile_dpbf16ps
#define LOOP(name, ...) \
  void name() { \
    for (int step = 0; step < STEPS; ++step) { __VA_ARGS__ } \
  }

LOOP(four_sums_four_operands, LEFT(4, 0); LEFT(5, 1); RIGHT(6, 0); RIGHT(7, 1); PRODUCT(0, 4, 6); PRODUCT(1, 4, 7);
     PRODUCT(3, 5, 7); PRODUCT(2, 5, 6);)
LOOP(four_sums_three_operands, LEFT(4, 0); RIGHT(6, 0); PRODUCT(0, 4, 6); RIGHT(5, 1); PRODUCT(1, 4, 5); LEFT(4, 1);
     PRODUCT(3, 4, 5); PRODUCT(2, 4, 6);)
LOOP(four_sums_two_operands, LEFT(4, 0); RIGHT(5, 0); PRODUCT(0, 4, 5); RIGHT(5, 1); PRODUCT(1, 4, 5); LEFT(4, 1);
     PRODUCT(3, 4, 5); RIGHT(5, 0); PRODUCT(2, 4, 5);)
LOOP(two_sums_three_operands, LEFT(2, 0); RIGHT(3, 0); RIGHT(4, 1); PRODUCT(0, 2, 3); PRODUCT(1, 2, 4);)
LOOP(two_sums_two_operands, LEFT(2, 0); RIGHT(3, 0); PRODUCT(0, 2, 3); RIGHT(3, 1); PRODUCT(1, 2, 3);)
LOOP(one_sum_two_operands, LEFT(2, 0); RIGHT(3, 0); PRODUCT(0, 2, 3);)
LOOP(no_loads, PRODUCT(0, 4, 6); PRODUCT(1, 4, 7); PRODUCT(3, 5, 7); PRODUCT(2, 5, 6);)

struct Loop {
  const char* name;
  void (*run)();
  int tiles, products;
  double loads;  // a product
  std::vector<double> nanoseconds;
};

}  // namespace

int main() {
  if (syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) != 0) {
    std::fprintf(stderr, "tiles: this processor has none (AMX), or the system does not let programs use them\n");
    return 1;
  }
  Loop loops[] = {{"4 sums, 4 operands", four_sums_four_operands, 8, 4, 1, {}},
                  {"4 sums, 3 operands", four_sums_three_operands, 7, 4, 1, {}},
                  {"4 sums, 2 operands", four_sums_two_operands, 6, 4, 1.25, {}},
                  {"2 sums, 3 operands", two_sums_three_operands, 5, 2, 1.5, {}},
                  {"2 sums, 2 operands", two_sums_two_operands, 4, 2, 1.5, {}},
                  {"1 sum, 2 operands", one_sum_two_operands, 3, 1, 2, {}},
                  {"4 sums, nothing loaded", no_loads, 8, 4, 0, {}}};
  for (int turn = 0; turn < TURNS; ++turn)
    for (Loop& loop : loops) {
      const Configuration configuration;
      _tile_loadconfig(&configuration);
      loop.run();
      const auto begin = std::chrono::steady_clock::now();
      loop.run();
      const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
      loop.nanoseconds.push_back(taken.count() / (STEPS * loop.products));
      _tile_release();
    }
  std::printf("| loop | tiles in use | loads a product | ns a product: 5%% | 50%% | 95%% of the turns |\n");
  std::printf("| --- | --- | --- | --- | --- | --- |\n");
  for (Loop& loop : loops) {
    std::sort(loop.nanoseconds.begin(), loop.nanoseconds.end());
    const auto at = [&](int percent) { return loop.nanoseconds[TURNS * percent / 100]; };
    std::printf("| %s | %d | %.3g | %.1f | %.1f | %.1f |\n", loop.name, loop.tiles, loop.loads, at(5), at(50), at(95));
  }
}
