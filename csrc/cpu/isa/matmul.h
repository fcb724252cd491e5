// Matrix products c (+)= a * b whose sums stay in registers, on operands that pack.h lays out.
//
// An element of a and b has 4 bytes: a float32, or two bfloat16 that are neighbours along the summed
// dimension, as VDPBF16PS reads them. `steps` is the length of the summed dimension in elements. a is
// [rows][steps], with a stride of lda elements. b is cut into strips of up to NV vectors of columns, each
// [steps][columns].
#pragma once
#include "isa/convert.h"
#include "kernels.h"
#if defined(__AMX_BF16__)
#include "isa/amx.h"
#endif

namespace {

using flashbrush::round_up;

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

#if defined(__AVX512F__)
// Vectors of columns: 6 x 4 accumulators, 4 vectors of b and one of a fill 29 of 32 registers.
constexpr int NV = 4;
#else
// 6 x 2 accumulators, 2 vectors of b and one of a fill 15 of 16 registers.
constexpr int NV = 2;
#endif
constexpr int kVectorRows = 6;  // rows of a product by vectors

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
template <bool ON>
struct AmxScope {
  AmxScope() {}
};
#endif

// Rows of one product.
template <bool PAIRS>
constexpr int group_rows() {
  return kHasAmx && PAIRS ? 16 : kVectorRows;
}

constexpr int kRowGroup = kHasAmx ? 48 : kVectorRows;  // a multiple of group_rows for every dtype

// An element of packed operands: a pair of bfloat16 where the hardware multiplies pairs, else a float32.
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
inline void multiply(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, float* c,
                     int64_t ldc) {
  vf acc[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = splat(0.f);
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
    // c gets one addition a product, not one a step: a running sum over thousands of keys rounds as often.
    for (int j = 0; j < N; ++j)
      store(c + i * ldc + j * W, ADD ? load(c + i * ldc + j * W) + acc[i][j] : acc[i][j]);
}

// How `vectors` of columns of b are cut into strips: of equal width within one, none wider than NV.
struct Strips {
  int count, vectors;
  explicit Strips(int vectors) : count((vectors + NV - 1) / NV), vectors(vectors) {}
  int width(int i) const { return vectors / count + (i < vectors % count); }
  int first(int i) const { return i * (vectors / count) + (i < vectors % count ? i : vectors % count); }
};

// c[group_rows][vectors] (+)= a * b for all strips of b, which are `depth` steps apart. With AMX an AmxScope
// must live, and operands are padded to 16 steps.
template <bool PAIRS, bool ADD>
inline void multiply_strips(int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t depth,
                            const Strips& strips, float* c, int64_t ldc) {
  for (int i = 0; i < strips.count; ++i) {
    const int first = strips.first(i);
    const uint32_t* strip = b + int64_t(first) * W * depth;
    float* out = c + first * W;
#if defined(__AMX_BF16__)
    if constexpr (PAIRS) {
      switch (strips.width(i)) {
        case 1:
          multiply_amx<1, ADD>(steps, a, lda, strip, out, ldc);
          break;
        case 2:
          multiply_amx<2, ADD>(steps, a, lda, strip, out, ldc);
          break;
        case 3:
          multiply_amx<3, ADD>(steps, a, lda, strip, out, ldc);
          break;
        case 4:
          multiply_amx<4, ADD>(steps, a, lda, strip, out, ldc);
          break;
      }
      continue;
    }
#endif
    switch (strips.width(i)) {
      case 1:
        multiply<PAIRS, kVectorRows, 1, ADD>(steps, a, lda, strip, out, ldc);
        break;
      case 2:
        multiply<PAIRS, kVectorRows, 2, ADD>(steps, a, lda, strip, out, ldc);
        break;
#if defined(__AVX512F__)
      case 3:
        multiply<PAIRS, kVectorRows, 3, ADD>(steps, a, lda, strip, out, ldc);
        break;
      case 4:
        multiply<PAIRS, kVectorRows, 4, ADD>(steps, a, lda, strip, out, ldc);
        break;
#endif
    }
  }
}

template <int DTYPE>
// Element i of a row as the bits of a float32.
inline uint32_t f32_bits(const void* p, int64_t i) {
  const float x = to_f32<DTYPE>(p, i);
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

#if defined(__AVX512F__)
// out[s * stride + i] = word s of row i, for 16 rows and 16 words.
inline void transpose_words(const char* const* rows, int64_t first_word, uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + 4 * first_word);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + n]: word n of each 128-bit lane, of rows i .. i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    const __m512i low02 = _mm512_shuffle_i32x4(a[n], a[4 + n], 0x88),
                  low13 = _mm512_shuffle_i32x4(a[n], a[4 + n], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(a[8 + n], a[12 + n], 0x88),
                  high13 = _mm512_shuffle_i32x4(a[8 + n], a[12 + n], 0xdd);
    _mm512_storeu_si512(out + n * stride, _mm512_shuffle_i32x4(low02, high02, 0x88));
    _mm512_storeu_si512(out + (4 + n) * stride, _mm512_shuffle_i32x4(low13, high13, 0x88));
    _mm512_storeu_si512(out + (8 + n) * stride, _mm512_shuffle_i32x4(low02, high02, 0xdd));
    _mm512_storeu_si512(out + (12 + n) * stride, _mm512_shuffle_i32x4(low13, high13, 0xdd));
  }
}
#endif

}  // namespace
