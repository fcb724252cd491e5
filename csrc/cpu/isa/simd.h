// Vectors of W float32 for the instruction set that a file is compiled for, exp2 on them, and 16-bit numbers.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
inline vf splat(float x) {
  return _mm512_set1_ps(x);
}
inline vf load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void store(float* p, vf x) {
  _mm512_storeu_ps(p, x);
}
inline vf fma(vf a, vf b, vf c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline vf maximum(vf a, vf b) {
  return _mm512_max_ps(a, b);
}
// True for NaN too.
inline bool any_greater(vf a, vf b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0;
}
inline float sum(vf x) {
  return _mm512_reduce_add_ps(x);
}
inline float largest(vf x) {
  return _mm512_reduce_max_ps(x);
}
// to[0 .. 4] = sum(x0), sum(x1), sum(x2), sum(x3)
inline void store_sums(float* to, vf x0, vf x1, vf x2, vf x3) {
  const vf low = _mm512_add_ps(_mm512_unpacklo_ps(x0, x1), _mm512_unpackhi_ps(x0, x1));
  const vf high = _mm512_add_ps(_mm512_unpacklo_ps(x2, x3), _mm512_unpackhi_ps(x2, x3));
  const vf lanes = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  const vf halves = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
  _mm_storeu_ps(to,
                _mm512_castps512_ps128(_mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1))));
}
// x where t >= bound or t is NaN, else 0
inline vf keep_from(vf t, vf bound, vf x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, bound, _CMP_NLT_UQ), x);
}
#elif defined(__AVX2__)
constexpr int W = 8;
typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));
inline vf splat(float x) {
  return _mm256_set1_ps(x);
}
inline vf load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void store(float* p, vf x) {
  _mm256_storeu_ps(p, x);
}
inline vf fma(vf a, vf b, vf c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline vf maximum(vf a, vf b) {
  return _mm256_max_ps(a, b);
}
inline bool any_greater(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
}
inline float sum(vf x) {
  float lane[8];
  store(lane, x);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}
inline float largest(vf x) {
  float lane[8];
  store(lane, x);
  float m = lane[0];
  for (int i = 1; i < 8; ++i) m = lane[i] > m ? lane[i] : m;
  return m;
}
inline void store_sums(float* to, vf x0, vf x1, vf x2, vf x3) {
  const vf lanes = _mm256_hadd_ps(_mm256_hadd_ps(x0, x1), _mm256_hadd_ps(x2, x3));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
inline vf keep_from(vf t, vf bound, vf x) {
  return _mm256_and_ps(_mm256_cmp_ps(t, bound, _CMP_NLT_UQ), x);
}
#else
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
inline vf splat(float x) {
  return vf{x, x, x, x};
}
inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, vf x) {
  memcpy(p, &x, sizeof x);
}
inline vf fma(vf a, vf b, vf c) {
  return a * b + c;
}
inline vf maximum(vf a, vf b) {
  return a > b ? a : b;
}
inline bool any_greater(vf a, vf b) {
  bool any = false;
  for (int i = 0; i < W; ++i) any |= !(a[i] <= b[i]);
  return any;
}
inline float sum(vf x) {
  return (x[0] + x[2]) + (x[1] + x[3]);
}
inline float largest(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
inline void store_sums(float* to, vf x0, vf x1, vf x2, vf x3) {
  to[0] = sum(x0), to[1] = sum(x1), to[2] = sum(x2), to[3] = sum(x3);
}
inline vf keep_from(vf t, vf bound, vf x) {
  return t < bound ? splat(0.f) : x;
}
#endif

// 2^f for f in [0, 1), exactly 1 at 0. Minimax polynomial in relative error: 8e-8 with DEGREE 5; 3e-6 with
// DEGREE 4, far below the rounding of a 16-bit probability.
template <int DEGREE>
inline vf exp2_fraction(vf f) {
  vf p;
  if constexpr (DEGREE >= 5) {
    p = fma(splat(1.86713017e-3f), f, splat(9.01702978e-3f));
    p = fma(p, f, splat(5.57999127e-2f));
    p = fma(p, f, splat(2.40164444e-1f));
    p = fma(p, f, splat(6.93151295e-1f));
  } else {
    p = fma(splat(1.34266848e-2f), f, splat(5.22424728e-2f));
    p = fma(p, f, splat(2.41280198e-1f));
    p = fma(p, f, splat(6.93044841e-1f));
  }
  return fma(p, f, splat(1.f));
}

// 2^t. Exactly 0 for -inf, NaN for NaN; above 2^127 a large number or inf.
template <int DEGREE>
inline vf exp2(vf t) {
#if defined(__AVX512F__)
  // VREDUCE returns t - floor(t), and 0 for an infinity. VSCALEF multiplies by 2^floor(t).
  return _mm512_scalef_ps(
      exp2_fraction<DEGREE>(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)), t);
#else
  const vf low = splat(-126.f),
           magic = splat(12582912.f + 127.f);  // adding 1.5 * 2^23 rounds to an integer, in the low bits
  // maximum returns its second argument if one is NaN, so that NaN passes.
  const vf x = -maximum(splat(-127.f), -maximum(low, t));
  vf shifted = (x - splat(0.5f)) + magic, whole = shifted - magic;
  vi bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  vf power;
  memcpy(&power, &bits, sizeof power);
  return keep_from(t, low, exp2_fraction<DEGREE>(x - whole) * power);
#endif
}

inline float bf16_to_f32(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounds to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline float f16_to_f32(uint16_t x) {
  _Float16 h;
  memcpy(&h, &x, sizeof h);
  return float(h);
}

inline uint16_t f32_to_f16(float f) {
  _Float16 h = _Float16(f);
  uint16_t x;
  memcpy(&x, &h, sizeof x);
  return x;
}

}  // namespace
