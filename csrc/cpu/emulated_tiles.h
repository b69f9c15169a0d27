// Tiles in software, for builds that test the code for them where the processor has none, or where a sanitizer is to see
// what they load. Included by simd.h in place of the instructions.
#pragma once

#include <cstdint>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace peftdyno {
namespace PEFTDYNO_ISA {

constexpr int NUM_TILES = 8, TILE_ROWS = 16, TILE_BYTES = 64;

// Of one thread; `used` are those that the configuration gives a size.
struct Tiles {
  alignas(64) unsigned char bytes[NUM_TILES][TILE_ROWS][TILE_BYTES];
  bool used[NUM_TILES];

  unsigned char (*at(int tile))[TILE_BYTES] {
    if (!used[tile]) __builtin_trap();
    return bytes[tile];
  }
};

static thread_local Tiles tiles;

// Every configured tile is whole: other sizes are not used here.
static inline void emulated_loadconfig(const void* configuration) {
  const unsigned char* c = static_cast<const unsigned char*>(configuration);
  for (int i = 0; i < NUM_TILES; ++i) {
    uint16_t row_bytes;
    __builtin_memcpy(&row_bytes, c + 16 + 2 * i, sizeof row_bytes);
    tiles.used[i] = row_bytes == TILE_BYTES && c[48 + i] == TILE_ROWS;
  }
}

static inline void emulated_release() {
  for (bool& used : tiles.used) used = false;
}

static inline void emulated_loadd(int tile, const void* base, int64_t stride) {
  auto rows = tiles.at(tile);
  for (int r = 0; r < TILE_ROWS; ++r)
    __builtin_memcpy(rows[r], static_cast<const unsigned char*>(base) + r * stride, TILE_BYTES);
}

static inline void emulated_stored(int tile, void* base, int64_t stride) {
  auto rows = tiles.at(tile);
  for (int r = 0; r < TILE_ROWS; ++r)
    __builtin_memcpy(static_cast<unsigned char*>(base) + r * stride, rows[r], TILE_BYTES);
}

static inline void emulated_zero(int tile) {
  __builtin_memset(tiles.at(tile), 0, TILE_ROWS * TILE_BYTES);
}

static inline float emulated_half(uint32_t pair, bool odd) {
  const uint32_t bits = odd ? pair & 0xffff0000u : pair << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// c [16, 16] += the pairs of a [16, 16] times those of b [16, 16].
static inline void emulated_dpbf16ps(int to, int left, int right) {
  uint32_t a[TILE_ROWS][16], b[TILE_ROWS][16];
  float c[TILE_ROWS][16];
  __builtin_memcpy(a, tiles.at(left), sizeof a);
  __builtin_memcpy(b, tiles.at(right), sizeof b);
  __builtin_memcpy(c, tiles.at(to), sizeof c);
  for (int m = 0; m < TILE_ROWS; ++m)
    for (int k = 0; k < 16; ++k)
      for (int odd = 0; odd < 2; ++odd)
        for (int n = 0; n < 16; ++n) c[m][n] += emulated_half(a[m][k], odd) * emulated_half(b[k][n], odd);
  __builtin_memcpy(tiles.at(to), c, sizeof c);
}

}  // namespace PEFTDYNO_ISA
}  // namespace peftdyno

#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_zero emulated_zero
#define _tile_dpbf16ps emulated_dpbf16ps
