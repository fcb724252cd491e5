// Register-blocked products on packed tiles, and the packing. An operand element is 4 bytes: a float32, or a pair of
// bfloat16 that are neighbours along the summed dimension (the layout of VDPBF16PS).
#pragma once
#include "attention.h"
#include "simd.h"

namespace {

using flashbrush::round_up;

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

#if defined(__AVX512F__)
constexpr int NV = 4;  // 6 x 4 accumulators, 4 columns of B and one of A fill 29 of 32 registers
#else
constexpr int NV = 2;  // 6 x 2, 2 and 1: 15 of 16
#endif
constexpr int MR = 6;
constexpr int KT = 64;  // keys of a tile: K and V of 64 keys at D 128 in bfloat16 are 32 KiB, and stay in L1

// How an element of a dtype is held in packed tiles: pairs of bfloat16 where the hardware multiplies them, else float32.
template <bool PAIRS>
struct Element;

template <>
struct Element<false> {
  static constexpr int per = 1;
  static inline vf multiply(const uint32_t* a, vf b, vf c) {
    float x;
    memcpy(&x, a, 4);
    return fma(splat(x), b, c);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Element<true> {
  static constexpr int per = 2;
  static inline vf multiply(const uint32_t* a, vf b, vf c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int32_t(*a)), (__m512bh)b);
  }
};
#endif

// c[R][N vectors] (+)= a[R][steps] * b[steps][N vectors]
template <bool PAIRS, int R, int N, bool ADD>
inline void multiply(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, float* c, int64_t ldc) {
  vf acc[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = ADD ? load(c + i * ldc + j * W) : splat(0.f);
  for (int64_t s = 0; s < steps; ++s) {
    vf column[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) column[j] = load((const float*)(b + (s * N + j) * W));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = Element<PAIRS>::multiply(a + i * lda + s, column[j], acc[i][j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// The strips that `vectors` columns of B are cut into: as even as can be, none wider than NV.
struct Strips {
  int count, vectors;
  explicit Strips(int vectors) : count((vectors + NV - 1) / NV), vectors(vectors) {}
  int width(int i) const { return vectors / count + (i < vectors % count); }
  int first(int i) const { return i * (vectors / count) + (i < vectors % count ? i : vectors % count); }
};

template <bool PAIRS, bool ADD>
inline void multiply_strips(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t depth, int vectors, float* c, int64_t ldc) {
  const Strips strips(vectors);
  for (int i = 0; i < strips.count; ++i) {
    const int first = strips.first(i);
    const uint32_t* strip = b + int64_t(first) * W * depth;
    float* out = c + first * W;
    switch (strips.width(i)) {
      case 1: multiply<PAIRS, MR, 1, ADD>(steps, a, lda, strip, out, ldc); break;
      case 2: multiply<PAIRS, MR, 2, ADD>(steps, a, lda, strip, out, ldc); break;
#if defined(__AVX512F__)
      case 3: multiply<PAIRS, MR, 3, ADD>(steps, a, lda, strip, out, ldc); break;
      case 4: multiply<PAIRS, MR, 4, ADD>(steps, a, lda, strip, out, ldc); break;
#endif
    }
  }
}

// Where element (step, column) of a packed operand lies.
inline int64_t place(const Strips& strips, int64_t depth, int64_t step, int column) {
  const int vector = column / W;
  int i = 0;
  while (i + 1 < strips.count && strips.first(i + 1) <= vector) ++i;
  return (int64_t(strips.first(i)) * depth + step * strips.width(i) + (vector - strips.first(i))) * W + column % W;
}

template <int DTYPE>
inline float to_f32(const void* p, int64_t i) {
  if constexpr (DTYPE == FB_F32) return ((const float*)p)[i];
  if constexpr (DTYPE == FB_BF16) return bf16_to_f32(((const uint16_t*)p)[i]);
  return f16_to_f32(((const uint16_t*)p)[i]);
}

template <int DTYPE, bool PAIRS>
inline uint32_t element(const void* even, const void* odd, int64_t i, int64_t j) {
  if constexpr (PAIRS) {
    uint32_t low = even ? ((const uint16_t*)even)[i] : 0, high = odd ? ((const uint16_t*)odd)[j] : 0;
    return low | high << 16;
  } else {
    float x = to_f32<DTYPE>(even, i);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
  }
}

}  // namespace
