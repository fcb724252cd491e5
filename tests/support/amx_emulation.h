// AMX and AVX512_BF16 in plain C++, for machines with AVX-512 only. Included before any other header, it
// replaces the intrinsics that csrc/cpu uses by functions that do what Intel's manual says of each
// instruction. Where a processor would raise an invalid opcode (tiles without a configuration, shapes that do
// not fit) the process aborts.
#pragma once
#if defined(__AVX512F__)
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

struct Tile {
  uint8_t row[16][64];
};

struct State {
  bool configured;
  uint16_t bytes[8];
  uint8_t rows[8];
  Tile tile[8];
};

inline thread_local State state;

inline void demand(bool holds) {
  if (!holds) abort();
}

inline State& configured(int n) {
  demand(state.configured && n >= 0 && n < 8 && state.rows[n] && state.bytes[n]);
  return state;
}

// Palette 1: 16 bytes of header, for each tile the bytes of a row (16 words) and its rows (16 bytes). Zeroes
// the tiles.
inline void load_config(const void* from) {
  const uint8_t* x = (const uint8_t*)from;
  demand(x[0] == 1 && x[1] == 0);
  for (int i = 2; i < 16; ++i) demand(x[i] == 0);
  memset(&state, 0, sizeof state);
  for (int n = 0; n < 16; ++n) {
    uint16_t bytes;
    memcpy(&bytes, x + 16 + 2 * n, 2);
    const uint8_t rows = x[48 + n];
    demand(n < 8 ? bytes <= 64 && rows <= 16 && !bytes == !rows : !bytes && !rows);
    if (n < 8) state.bytes[n] = bytes, state.rows[n] = rows;
  }
  state.configured = true;
}

inline void release() {
  memset(&state, 0, sizeof state);
}

inline void zero(int n) {
  memset(&configured(n).tile[n], 0, sizeof(Tile));
}

inline void load(int n, const void* base, int64_t stride) {
  zero(n);
  for (int r = 0; r < state.rows[n]; ++r)
    memcpy(state.tile[n].row[r], (const char*)base + r * stride, state.bytes[n]);
}

inline void store(int n, void* base, int64_t stride) {
  configured(n);
  for (int r = 0; r < state.rows[n]; ++r)
    memcpy((char*)base + r * stride, state.tile[n].row[r], state.bytes[n]);
}

// Denormal inputs and results are zeros.
inline float flush(float x) {
  return fabsf(x) < FLT_MIN ? copysignf(0.f, x) : x;
}

inline float widen(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return flush(x);
}

// TDPBF16PS: sums the products of the even members of pairs and those of the odd ones by fused multiply-add,
// then adds both sums to C.
inline void multiply(int c, int a, int b) {
  configured(c), configured(a), configured(b);
  demand(c != a && c != b && a != b);
  demand(state.rows[c] == state.rows[a] && state.bytes[c] == state.bytes[b] &&
         state.bytes[a] == 4 * state.rows[b]);
  const int columns = state.bytes[c] / 4;
  for (int m = 0; m < state.rows[c]; ++m) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < state.bytes[a] / 4; ++k) {
      uint32_t pair, row[16];
      memcpy(&pair, state.tile[a].row[m] + 4 * k, 4);
      memcpy(row, state.tile[b].row[k], 64);
      const float low = widen(pair << 16), high = widen(pair & 0xffff0000u);
      for (int n = 0; n < columns; ++n) {
        even[n] = flush(__builtin_fmaf(low, widen(row[n] << 16), even[n]));
        odd[n] = flush(__builtin_fmaf(high, widen(row[n] & 0xffff0000u), odd[n]));
      }
    }
    memcpy(sum, state.tile[c].row[m], 64);
    for (int n = 0; n < columns; ++n) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
    memcpy(state.tile[c].row[m], sum, 64);
  }
}

// VCVTNEPS2BF16: rounds to nearest even; denormals become zero, NaN stays NaN.
inline __m256i round_pairs(__m512 x) {
  alignas(64) uint32_t in[16];
  alignas(32) uint16_t out[16];
  _mm512_store_si512(in, _mm512_castps_si512(x));
  for (int i = 0; i < 16; ++i) {
    const uint32_t size = in[i] & 0x7fffffffu;
    uint32_t bits = (in[i] + 0x7fffu + ((in[i] >> 16) & 1)) >> 16;
    if (size < 0x00800000u) bits = in[i] >> 16 & 0x8000u;
    if (size > 0x7f800000u) bits = in[i] >> 16 | 0x40u;
    out[i] = uint16_t(bits);
  }
  return _mm256_load_si256((const __m256i*)out);
}

inline __m512i round_two(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_pairs(low)), round_pairs(high), 1);
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() emulated::release()
#define _tile_zero(n) emulated::zero(n)
#define _tile_loadd(n, base, stride) emulated::load(n, base, stride)
#define _tile_stored(n, base, stride) emulated::store(n, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
#define _mm512_cvtneps_pbh(x) emulated::round_pairs(x)
#define _mm512_cvtne2ps_pbh(high, low) emulated::round_two(high, low)
#endif
