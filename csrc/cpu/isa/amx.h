// Products of bfloat16 pairs by AMX (TDPBF16PS), on the operands that matmul.h packs: its B, pairs along the
// summed dimension in rows of columns, is what the instruction wants, a tile of 16 x 16 words being read with
// the strip's stride.
//
// Tiles 0 .. 3 hold sums of 16 rows and up to 64 columns, 4 holds A, 5 and 6 take turns with B. All have 16
// rows of 64 bytes, so that one configuration serves: operands are padded with zeros to 16 words along the
// summed dimension.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kTileRows = 16, kTileWords = 16;

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

alignas(64) const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16}};

// The tiles are configured while it lives, and in their initial state after it: they belong to the thread,
// which is torch's.
template <bool ON>
struct Tiles {
  Tiles() {
    if constexpr (ON) _tile_loadconfig(&kTileConfig);
  }
  ~Tiles() {
    if constexpr (ON) _tile_release();
  }
  Tiles(const Tiles&) = delete;
};

// c[16][N * 16] (+)= a[16][steps] * b[steps][N * 16]; steps are rounded up to 16.
template <int N, bool ADD>
inline void multiply_tiles(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, float* c,
                           int64_t ldc) {
  static_assert(N >= 1 && N <= 4);
  // gcc's tile loads do not say that they read memory: what was stored before must not move behind them.
  asm volatile("" ::: "memory");
  // Tile numbers are part of the instructions' text.
#define FB_TILES(use)             \
  use(0, 5);                      \
  if constexpr (N > 1) use(1, 6); \
  if constexpr (N > 2) use(2, 5); \
  if constexpr (N > 3) use(3, 6)
#define FB_START(n, _)                             \
  {                                                \
    if constexpr (ADD) {                           \
      _tile_loadd(n, c + n * kTileWords, ldc * 4); \
    } else {                                       \
      _tile_zero(n);                               \
    }                                              \
  }
#define FB_MULTIPLY(n, t)                                 \
  {                                                       \
    _tile_loadd(t, b + (s * N + n) * kTileWords, N * 64); \
    _tile_dpbf16ps(n, 4, t);                              \
  }
#define FB_STORE(n, _)                            \
  {                                               \
    _tile_stored(n, c + n * kTileWords, ldc * 4); \
  }
  FB_TILES(FB_START);
  for (int64_t s = 0; s < steps; s += kTileWords) {
    _tile_loadd(4, a + s, lda * 4);
    FB_TILES(FB_MULTIPLY);
  }
  FB_TILES(FB_STORE);
#undef FB_STORE
#undef FB_MULTIPLY
#undef FB_START
#undef FB_TILES
}

}  // namespace
