// Products of bfloat16 pairs by AMX (the instruction TDPBF16PS), on the operands that matmul.h packs. That
// packing, pairs along the summed dimension in rows of columns, is also what the instruction reads: 16 x 16
// words at a time, with the strip's stride.
//
// AMX has tile registers, which have nothing to do with the tiles of keys elsewhere. Registers 0 .. 3 hold
// sums of 16 rows and up to 64 columns, 4 holds A, 5 and 6 hold B in turn. All are configured as 16 rows of
// 64 bytes once; operands are therefore padded with zeros to 16 words along the summed dimension.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kAmxRows = 16, kAmxWords = 16;

// The 64 bytes that LDTILECFG reads.
struct AmxConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

alignas(64) const AmxConfig kAmxConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16}};

// Configures the tile registers of this thread while it lives, and resets them: the thread is torch's.
template <bool ON>
struct AmxScope {
  AmxScope() {
    if constexpr (ON) _tile_loadconfig(&kAmxConfig);
  }
  ~AmxScope() {
    if constexpr (ON) _tile_release();
  }
  AmxScope(const AmxScope&) = delete;
};

// c[16][N * 16] (+)= a[16][steps] * b[steps][N * 16]; `steps`, in words, is rounded up to 16.
template <int N, bool ADD>
inline void multiply_amx(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, float* c,
                         int64_t ldc) {
  static_assert(N >= 1 && N <= 4);
  // gcc does not know that its tile loads read memory: earlier stores must not move behind them.
  asm volatile("" ::: "memory");
  // The number of a tile register is part of the instruction, so loops over registers are macros.
#define FB_REGISTERS(use)         \
  use(0, 5);                      \
  if constexpr (N > 1) use(1, 6); \
  if constexpr (N > 2) use(2, 5); \
  if constexpr (N > 3) use(3, 6)
#define FB_START(n, _)                            \
  {                                               \
    if constexpr (ADD) {                          \
      _tile_loadd(n, c + n * kAmxWords, ldc * 4); \
    } else {                                      \
      _tile_zero(n);                              \
    }                                             \
  }
#define FB_MULTIPLY(n, t)                                \
  {                                                      \
    _tile_loadd(t, b + (s * N + n) * kAmxWords, N * 64); \
    _tile_dpbf16ps(n, 4, t);                             \
  }
#define FB_STORE(n, _)                           \
  {                                              \
    _tile_stored(n, c + n * kAmxWords, ldc * 4); \
  }
  FB_REGISTERS(FB_START);
  for (int64_t s = 0; s < steps; s += kAmxWords) {
    _tile_loadd(4, a + s, lda * 4);
    FB_REGISTERS(FB_MULTIPLY);
  }
  FB_REGISTERS(FB_STORE);
#undef FB_STORE
#undef FB_MULTIPLY
#undef FB_START
#undef FB_REGISTERS
}

}  // namespace
